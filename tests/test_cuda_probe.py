"""bench/cuda without a GPU: the exchanges' logic, the table's parts, the script around them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusedrnn
from bench.cuda import cases, cudnn_table, probe_table, small_run, timing
from bench.cuda.cases import Case, Layers
from bench.shapes import SHAPES, Shape

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


# ---- what is measured ---------------------------------------------------------------------------


def test_the_most_wanted_cases_come_first() -> None:
    found = list(cases.all_cases())
    assert len(found) == len(set(found))
    assert {c.shape for c in found[:27]} == set(cases.LONG), "LSTM, 3 dtypes, 3 modes"
    plain = {c.shape for c in found if c.layers == Layers()}
    assert plain == {*SHAPES, *cases.LONG, *cases.AROUND}
    for cell in cudnn_table.MODULES:
        each = [c for c in found if c.cell == cell and c.layers == Layers()]
        assert len(each) == len(plain) * 9
    assert {c.layers for c in found} == {Layers(), *cases.SPECIALS}
    assert not any(c.layers.packed and c.mode == "graph" for c in found)
    assert [str(layers) for layers in cases.SPECIALS] == [
        "packed, lengths 1..T",
        "bidirectional",
        "4 layers",
    ]


class Pretended:
    """A device whose clock its calls advance; marks are asked for in pairs."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.calls, self.each = 0.0, 0, seconds

    def __call__(self) -> None:
        self.now += self.each[min(self.calls, len(self.each) - 1)]
        self.calls += 1

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


def test_measuring_leaves_out_the_first_calls() -> None:
    device = Pretended(9.0, 1e-3)
    found = timing.measure(device, device, 0.1)
    assert found.seconds == pytest.approx(1e-3)
    assert (found.rounds, found.repeats) == (25, 4)
    assert device.calls == 3 + 4 + 25 * 4


def test_measuring_takes_the_median_round() -> None:
    quick, slow = 1.0, 50.0
    device = Pretended(quick, quick, quick, quick, slow, quick, quick, slow, quick)
    found = timing.measure(device, device, 1.0)
    assert found == timing.Timing(1.0, timing.MIN_ROUNDS, 1)


@pytest.mark.parametrize(
    ("call", "bound", "expected"),
    [
        (1e-5, 0.15, (25, 400)),  # a round of 4 ms
        (1e-3, 0.15, (25, 4)),
        (1e-2, 0.15, (15, 1)),
        (1.0, 0.15, (5, 1)),  # the bound gives way
        (1e-5, 0.001, (5, 20)),  # a round that is shorter than it should be
    ],
)
def test_rounds_fit_the_bound(call: float, bound: float, expected: tuple[int, int]) -> None:
    assert timing.plan(call, bound) == expected


@pytest.mark.parametrize("layers", [Layers(), *cases.SPECIALS], ids=str)
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_calls_run_and_use_all_rows(layers: Layers, mode: str) -> None:
    call = cudnn_table.make_call(Case("gru", layers, SMALL, "float32", mode), "cpu")
    output = call()
    if mode == "forward":
        rows = 1 + 4 + 7 if layers.packed else SMALL.steps * SMALL.batch
        assert output.numel() == rows * SMALL.hidden_size * (2 if layers.bidirectional else 1)


def test_results_that_are_not_finite_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.full(size, float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        cudnn_table.make_call(Case("lstm", Layers(), SMALL, "float32", "forward"), "cpu")


# ---- the table ----------------------------------------------------------------------------------

CASE = Case("lstm", Layers(), SMALL, "float32", "forward")


def row(seconds: float, **changes: object) -> cudnn_table.Row:
    return cudnn_table.Row(replace(CASE, **changes), timing.Timing(seconds, 9, 2))


def test_microseconds_a_step() -> None:
    assert row(14e-6).step_microseconds() == pytest.approx(2.0), "7 steps in 14 us"
    assert cudnn_table.Row(CASE, None, "lost").step_microseconds() is None


def test_tables(tmp_path: Path) -> None:
    rows = [
        row(14e-6),
        row(7e-3, dtype="float16", mode="training"),
        cudnn_table.Row(replace(CASE, mode="graph"), None, "out of memory"),
        row(21e-6, layers=Layers(packed=True)),
    ]
    cudnn_table.save({"gpu": "none"}, rows, tmp_path)
    text = (tmp_path / "cudnn.md").read_text()
    assert "- gpu: none" in text
    assert "| 3,7,5,4 | 2 | failed | - | - | - | - | - | - | 1000 |" in text
    assert "## LSTM, packed, lengths 1..T" in text
    assert "- lstm one layer, 3,7,5,4, float32, graph: out of memory" in text
    saved = json.loads((tmp_path / "cudnn.json").read_text())
    assert saved["header"] == {"gpu": "none"}
    assert saved["results"][0]["us_per_step"] == pytest.approx(2.0)
    assert saved["results"][2]["error"] == "out of memory"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cudnn.json", "cudnn.md"]


def test_running_goes_on_after_a_failure_and_stops_in_time() -> None:
    rows: list[cudnn_table.Row] = []
    wanted = [replace(CASE, mode="graph"), CASE]  # there is no graph without a GPU
    if torch.cuda.is_available():
        pytest.skip("the case that must fail does not, with a GPU")
    cudnn_table.run(wanted, timing.HostClock(), "cpu", 0.01, 60, rows.append)
    assert [bool(r.error) for r in rows] == [True, False]
    assert rows[1].step_microseconds() > 0
    rows.clear()
    cudnn_table.run(wanted, timing.HostClock(), "cpu", 0.01, -1, rows.append)
    assert rows == [], "the time was over before the first one"
    cudnn_table.run([wanted[0]] * 99, timing.HostClock(), "cpu", 0.01, 60, rows.append)
    assert len(rows) == cudnn_table.SAME_FAILURES, "it gives up where nothing works"


def test_without_a_gpu_the_table_says_so(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cudnn_table.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_was_measured_is_written_where_it_is_stopped(tmp_path: Path, monkeypatch) -> None:
    def stopped(wanted, clock, device, seconds, total, done) -> None:
        done(row(14e-6))
        raise SystemExit(143)  # as on SIGTERM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cudnn_table, "header", lambda: {"gpu": "pretended"})
    monkeypatch.setattr(cudnn_table, "run", stopped)
    monkeypatch.setattr(cudnn_table.signal, "signal", lambda *_: None)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        with pytest.raises(SystemExit, match="143"):
            cudnn_table.main(["--out", str(tmp_path)])
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert len(json.loads((tmp_path / "cudnn.json").read_text())["results"]) == 1


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
    assert capsys.readouterr().out.count(": right") == 3 * 3 * 2
    monkeypatch.setattr(small_run, "TOLERANCES", {"float32": 0.0})
    assert small_run.main("cpu") == 1
    assert "results are wrong" in capsys.readouterr().out


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
    shutil.copy(ROOT / "scripts" / "gpu_hour.sh", tmp_path / "scripts")
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


def gpu_hour(house: Path, *steps: str) -> tuple[int, dict[str, str]]:
    environment = os.environ | {
        "PATH": f"{house / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "LIMIT_CUDNN": "1",
    }
    run = subprocess.run(
        ["bash", house / "scripts" / "gpu_hour.sh", house / "out", *steps],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    lines = run.stdout.split("== summary")[1].splitlines()[1:]
    return run.returncode, {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_no_step_stops_another(house: Path) -> None:
    code, summary = gpu_hour(house)
    assert code == 1
    assert summary["probe"].startswith("exit code 1 ")
    assert summary["cudnn"].startswith("exit code 124 "), "its time limit"
    for name in ("machine", "build", "tests", "sanitizer-memcheck", "sanitizer-racecheck"):
        assert summary[name].startswith("exit code 0 "), name
    assert summary["compare"].startswith("skipped")
    asked = (house / "asked").read_text()
    assert "1 setup.py build_ext --inplace" in asked
    assert "1 -m pytest -x -q -m cuda" in asked
    assert (house / "out" / "probe.log").read_text() == "{}\n"


def test_without_a_build_nothing_that_needs_it_runs(house: Path) -> None:
    (house / "build_code").write_text("7")
    code, summary = gpu_hour(house, "build", "tests", "sanitizer")
    assert code == 1
    assert set(summary) == {"machine", "build", "tests", "sanitizer"}
    assert summary["build"].startswith("exit code 7 ")
    assert summary["tests"] == "skipped 0 s the build failed"
    assert "pytest" not in (house / "asked").read_text()


def test_all_went_well(house: Path) -> None:
    code, summary = gpu_hour(house, "build", "tests")
    assert (code, len(summary)) == (0, 3)
