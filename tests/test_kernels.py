"""The kernels without torch: programs of tests/kernels, linked with the objects of the build.

kernel_check.cpp drives the kernels through csrc/recurrence.h alone, with teams split by rows, by
hidden units and both, chunks of two steps, ragged rows and resets; tangent_check.cpp does those of
the tangents, through csrc/tangents.h. matrix_check.cpp does the products of a matrix unit with an
emulated one, plan_check.cpp how calls are cut over threads. `make sanitize` runs the same under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import fusedrnn

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = sorted(ROOT.glob("build/temp*/csrc/cpu"))
CXX = shutil.which("g++")
COMPILE = [CXX, "-O1", "-std=c++20", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-I{ROOT}"]
NO_AVX512 = 77  # matrix_check's exit status


def linked(name: str, folder: Path) -> Path:
    """tests/kernels/NAME.cpp as a program, with the kernels of the build."""
    if CXX is None or not OBJECTS:
        pytest.skip("needs g++ and the objects that `make build` leaves under build/")
    newest = max(OBJECTS, key=lambda folder: (folder / "plan.o").stat().st_mtime)
    objects = [newest / "isa.o", newest / "plan.o", *newest.glob("kernels_*.o")]
    source = ROOT / "tests" / "kernels" / f"{name}.cpp"
    command = [*COMPILE, source, *objects, "-pthread", "-o", folder / name]
    subprocess.run(command, check=True, timeout=300)
    return folder / name


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked("kernel_check", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def of_tangents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked("tangent_check", tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("isa", fusedrnn.cpu_isas())
def test_kernels_alone(program: Path, isa: str) -> None:
    run = subprocess.run([program, isa], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    # A set with narrow kernels of its own alone runs just these.
    cases = 1156 if isa.startswith("avx512_") else 5196 + 1156
    assert f"{cases} cases, 0 failures" in run.stdout


@pytest.mark.parametrize("isa", fusedrnn.cpu_isas())
def test_tangents_alone(of_tangents: Path, isa: str) -> None:
    run = subprocess.run([of_tangents, isa], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "896 cases, 0 failures" in run.stdout


def test_plans(tmp_path: Path) -> None:
    run = subprocess.run(
        [linked("plan_check", tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "25920 plans, 0 failures" in run.stdout


@pytest.mark.skipif(CXX is None, reason="needs g++")
def test_matrix_unit_emulated(tmp_path: Path) -> None:
    program = tmp_path / "matrix_check"
    source = ROOT / "tests" / "kernels" / "matrix_check.cpp"
    subprocess.run([*COMPILE, source, "-o", program], check=True, timeout=300)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if run.returncode == NO_AVX512:
        pytest.skip("emulates the unit of a processor with AVX-512, which this one has not")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "672 cases, 0 failures" in run.stdout
