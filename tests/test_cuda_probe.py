"""bench/cuda without a GPU: the exchanges' logic, the probe's lines, the script around them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

import cuda_cases
import fusedrnn
from bench.cuda import probe_table, small_run
from bench.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")
SMALL = Shape(3, 7, 5, 4)


# ---- the exchanges, between threads under ThreadSanitizer ---------------------------------------


@pytest.fixture(scope="module")
def protocols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CXX is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("protocols")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}")
    sanitized = [CXX, "-fsanitize=thread", "-pthread"]
    tried = subprocess.run([*sanitized, empty, "-o", folder / "empty"], capture_output=True)
    if tried.returncode != 0 or subprocess.run([folder / "empty"]).returncode != 0:
        pytest.skip("g++ has no ThreadSanitizer that runs here")
    target = folder / "protocol_check"
    source = ROOT / "tests" / "kernels" / "protocol_check.cpp"
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'bench' / 'cuda'}"]
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*sanitized, *options, *include, source, "-o", target], check=True, timeout=120)
    return target


def check(protocols: Path, which: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(
        [protocols, which], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize("which", ["sentinel", "flag", "push"])
def test_exchanges_are_right_and_free_of_races(protocols: Path, which: str) -> None:
    run = check(protocols, which)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{which}: 400 steps, 0 wrong words, 0 late threads" in run.stdout


@pytest.mark.parametrize(
    "which", ["sentinel-plain", "flag-relaxed", "push-one-buffer", "push-no-barrier"]
)
def test_broken_exchanges_race(protocols: Path, which: str) -> None:
    for _ in range(5):  # whether a race comes to light depends on who runs when
        run = check(protocols, which)
        if run.returncode != 0:
            break
    assert run.returncode in (1, 66), "neither a race nor a wrong word was found"
    assert run.returncode == 1 or "data race" in run.stderr


def test_words_that_are_not_waited_for_are_wrong(protocols: Path) -> None:
    run = check(protocols, "sentinel-unchecked")
    assert run.returncode == 1, run.stderr
    assert " 0 wrong words" not in run.stdout


# ---- the probe's lines ---------------------------------------------------------------------------


def test_the_probes_lines_become_tables() -> None:
    exchange = '{"figure": "exchange", "protocol": "flag", "ctas": %d, "groups": 1, '
    exchange += '"payload_bytes": %d, "steps": 512, %s}'
    lines = [
        '{"figure": "l2_size", "value": 50, "unit": "bytes", "how": "asked"}',
        "Segmentation fault",
        exchange % (8, 512, '"value": 1.25, "unit": "us/step", "how": "stores"'),
        exchange % (8, 2048, '"value": 2, "unit": "us/step", "how": "stores"'),
        exchange % (16, 2048, '"failed": "3 wrong or missing words"'),
    ]
    text = probe_table.markdown(probe_table.figures(lines))
    assert "| l2_size |  | 50 | bytes |" in text
    assert "### flag, one group: us a step" in text
    assert "| CTAs | 0.5 KB | 2 KB |" in text
    assert "| 8 | 1.25 | 2 |" in text
    assert "| 16 | - | failed |" in text
    assert '"failed": "3 wrong or missing words"' in text.split("Failed:")[1]


# ---- the small run for compute-sanitizer ---------------------------------------------------------


def test_the_small_run_compares(monkeypatch, capsys) -> None:
    assert small_run.main("cpu") == 0
    assert capsys.readouterr().out.count(": right") == 3 * 3 * 3
    monkeypatch.setattr(small_run, "TOLERANCES", {"float32": 0.0})
    assert small_run.main("cpu") == 1
    assert "results are wrong" in capsys.readouterr().out


def test_the_small_run_is_exact(monkeypatch) -> None:
    """torch starts with TF32 for recurrent layers, which is off by more than the tolerance."""
    seen = []
    monkeypatch.setattr(
        small_run, "run", lambda _: seen.append(torch.backends.cudnn.rnn.fp32_precision) or 0
    )
    before = torch.backends.cudnn.rnn.fp32_precision
    assert small_run.main("cpu") == 0
    assert seen == ["ieee"]
    assert torch.backends.cudnn.rnn.fp32_precision == before != "ieee"


def test_the_small_run_says_what_fusedrnn_raises(monkeypatch, capsys) -> None:
    honest = small_run.results

    def without_a_cuda_half(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        if isinstance(module, fusedrnn.LSTM):
            raise RuntimeError("built without its CUDA half\nand a trace")
        return honest(module, x)

    monkeypatch.setattr(small_run, "results", without_a_cuda_half)
    assert small_run.main("cpu") == 3
    assert capsys.readouterr().out == "small_run: lstm, float32: built without its CUDA half\n"


# ---- the script ---------------------------------------------------------------------------------


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A root with the script, and programs that write their arguments down."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu_check.sh", tmp_path / "scripts")
    executable(
        tmp_path / "bin" / "python",
        f'echo "$FUSEDRNN_CUDA $*" >> {tmp_path}/asked\n'
        f'[ "$1" != setup.py ] || exit $(cat {tmp_path}/build_code)\n'
        '[ "$2" != bench.cuda.cudnn_table ] || exec sleep 30\n',
    )
    for name in ("nvidia-smi", "nvcc", "compute-sanitizer"):
        executable(tmp_path / "bin" / name, "true")
    executable(tmp_path / "build" / "cuda" / "probe", "echo '{}'; exit 1")
    (tmp_path / "build_code").write_text("0")
    return tmp_path


TESTS = [f"tests-{name}" for name in (*cuda_cases.DTYPES_OF, "others")]


def gpu_check(house: Path, *steps: str, **variables: str) -> tuple[int, dict[str, str]]:
    environment = os.environ | {"PYTHON": str(house / "bin" / "python"), "LIMIT_CUDNN": "1"}
    environment |= variables
    run = subprocess.run(
        ["bash", house / "scripts" / "gpu_check.sh", house / "out", *steps],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    lines = run.stdout.split("== summary")[1].splitlines()[1:]
    return run.returncode, {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_no_step_stops_another(house: Path) -> None:
    code, summary = gpu_check(house)
    assert code == 1
    assert summary["probe"].startswith("exit code 1 ")
    assert summary["cudnn"].startswith("exit code 124 "), "its time limit"
    sanitizer = [f"{t}-{s}" for t in ("memcheck", "racecheck") for s in cuda_cases.DTYPES_OF]
    for name in ("machine", "build", *TESTS, *sanitizer, "compare"):
        assert summary[name].startswith("exit code 0 "), name
    asked = (house / "asked").read_text()
    assert f"1 -m bench.cuda.compare --out {house}/out --total 270" in asked
    assert asked.index("pytest") < asked.index("compare") < asked.index("cudnn_table")
    assert "1 setup.py build_ext --inplace" in asked
    options = "--maxfail=60 --tb=short --durations=5 -q --timeout=60 --timeout-method=thread"
    assert f"1 -m pytest {options} -m cuda -k persistent tests/test_cuda.py" in asked
    assert "-k not (per_step or one_cta or persistent) tests/test_cuda.py" in asked
    with tarfile.open(house / "out" / "logs.tar.gz") as logs:
        assert logs.extractfile("./probe.log").read() == b"{}\n"
        assert {f"./{name}.log" for name in summary} < set(logs.getnames())


def test_without_a_build_nothing_that_needs_it_runs(house: Path) -> None:
    (house / "build_code").write_text("7")
    code, summary = gpu_check(house, "build", "tests", "sanitizer")
    assert code == 1
    assert set(summary) == {"machine", "build", "tests", "sanitizer"}
    assert summary["build"].startswith("exit code 7 ")
    assert summary["tests"] == "skipped 0 s the build failed"
    assert "pytest" not in (house / "asked").read_text()


def test_all_went_well(house: Path) -> None:
    code, summary = gpu_check(house, "build", "tests")
    assert code == 0
    assert set(summary) == {"machine", "build", *TESTS}


def test_when_no_time_is_left(house: Path) -> None:
    code, summary = gpu_check(
        house, "cudnn", "compare", TOTAL="2", LIMIT_CUDNN="9", LIMIT_COMPARE="0"
    )
    assert code == 1
    assert summary["cudnn"].startswith("exit code 124 2 s ")
    assert summary["compare"] == "skipped 0 s no time is left"


def test_the_usage_is_the_whole_head(house: Path) -> None:
    script = house / "scripts" / "gpu_check.sh"
    run = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    lines = run.stdout.splitlines()
    assert lines[0].startswith("All checks and measurements")
    assert lines[-1].startswith("Exit code: 0")
