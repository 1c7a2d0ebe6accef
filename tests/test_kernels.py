"""The kernels without torch: tests/kernels/kernel_check.cpp, linked with the objects of the build.

It drives the kernels through csrc/recurrence.h alone, with teams split by rows, by hidden units and
both, chunks of two steps, ragged rows and resets. `make sanitize` runs the same under
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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CXX is None or not OBJECTS:
        pytest.skip("needs g++ and the objects that `make build` leaves under build/")
    newest = max(OBJECTS, key=lambda folder: (folder / "plan.o").stat().st_mtime)
    objects = [newest / "isa.o", newest / "plan.o", *newest.glob("kernels_*.o")]
    target = tmp_path_factory.mktemp("kernels") / "kernel_check"
    source = ROOT / "tests" / "kernels" / "kernel_check.cpp"
    command = [CXX, "-O1", "-std=c++20", f"-I{ROOT / 'csrc'}", source, *objects, "-pthread"]
    subprocess.run([*command, "-o", target], check=True, timeout=300)
    return target


@pytest.mark.parametrize("isa", fusedrnn.cpu_isas())
def test_kernels_alone(program: Path, isa: str) -> None:
    run = subprocess.run([program, isa], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4332 cases, 0 failures" in run.stdout
