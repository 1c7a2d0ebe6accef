"""The CUDA half on the host: its operators as tests/cuda_emulated/emulated.cpp makes them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")
FIBERS = Path("/usr/include/boost/context/fiber.hpp")
SOURCE = ROOT / "tests" / "cuda_emulated" / "emulated.cpp"


def load(folder: Path) -> Any:
    """The operators, compiled in `folder` once for each state of the sources."""
    if CXX is None:
        pytest.skip("needs g++")
    if not FIBERS.exists():
        pytest.skip("needs Boost.Context, Debian's package libboost-context-dev")
    torch_dir = Path(torch.__file__).parent
    include = torch_dir / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Werror", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}"]
    flags += [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-lboost_context"]
    state = hashlib.sha256(repr([CXX, torch.__version__, flags]).encode())
    headers = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
    for path in [*SOURCE.parent.iterdir(), *(p for p in headers if "cpu" not in p.parts)]:
        state.update(path.read_bytes())
    library = ROOT / "build" / f"cuda_emulated-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        for old in library.parent.glob("cuda_emulated-*.so"):
            old.unlink()
        new = folder / "library.so"
        subprocess.run([CXX, SOURCE, *flags, "-o", new], check=True, timeout=600)
        beside = library.with_suffix(f".{os.getpid()}")
        shutil.copy(new, beside)
        beside.replace(library)
    torch.ops.load_library(library)
    return torch.ops.fusedrnn_emulated
