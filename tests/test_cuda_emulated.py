"""The CUDA half without a GPU: its driver and its kernels as they stand, run on the host.

tests/cuda_emulated/emulated.cpp compiles them with a plain compiler against torch; what only a GPU
can show (launches, streams, cuBLAS) is left to test_cuda.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_cases
import oracle

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")
SOURCE = ROOT / "tests" / "cuda_emulated" / "emulated.cpp"
WHOLE = 64 << 20  # bytes of a part of time, as on a GPU


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The emulated operators, compiled once for each state of the sources."""
    if CXX is None:
        pytest.skip("needs g++")
    torch_dir = Path(torch.__file__).parent
    include = torch_dir / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Werror", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    state = hashlib.sha256(repr([CXX, torch.__version__, flags]).encode())
    headers = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
    for path in [SOURCE, *(p for p in headers if "cpu" not in p.parts)]:
        state.update(path.read_bytes())
    library = ROOT / "build" / f"cuda_emulated-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        for old in library.parent.glob("cuda_emulated-*.so"):
            old.unlink()
        new = tmp_path_factory.mktemp("emulated") / "library.so"
        subprocess.run([CXX, SOURCE, *flags, "-o", new], check=True, timeout=600)
        beside = library.with_suffix(f".{os.getpid()}")
        shutil.copy(new, beside)
        beside.replace(library)
    torch.ops.load_library(library)
    return torch.ops.fusedrnn_emulated


@pytest.fixture(autouse=True)
def _fast(one_thread: None) -> None:
    """Everything here is small."""


@pytest.mark.parametrize(("mode", "form", "dtype"), cuda_cases.CASES, ids=cuda_cases.IDS)
def test_against_torch_nn(ops: Any, mode: str, form: str, dtype: torch.dtype) -> None:
    ops.set_part_bytes(WHOLE)
    cuda_cases.check(ops, cuda_cases.Call(mode, dtype, **cuda_cases.FORMS[form]))
