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


class Library:
    """Compiles the operators, once for each state of the sources, beside whatever else goes on."""

    def __init__(self) -> None:
        self.compiler: subprocess.Popen[str] | None = None
        self.missing = ""
        if CXX is None:
            self.missing = "needs g++"
        elif not FIBERS.exists():
            self.missing = "needs Boost.Context, Debian's package libboost-context-dev"
        else:
            self._compile()

    def _compile(self) -> None:
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
        self.path = ROOT / "build" / f"cuda_emulated-{state.hexdigest()[:16]}.so"
        # Another run may be at the same: each writes a file of its own.
        self.beside = self.path.with_suffix(f".{os.getpid()}")
        if not self.path.exists():
            self.path.parent.mkdir(exist_ok=True)
            self.compiler = subprocess.Popen(
                [CXX, SOURCE, *flags, "-o", self.beside], stderr=subprocess.PIPE, text=True
            )

    def load(self) -> Any:
        """The operators, once they are compiled."""
        if self.missing:
            pytest.skip(self.missing)
        if self.compiler is not None:
            _, words = self.compiler.communicate(timeout=600)
            assert self.compiler.returncode == 0, words
            for old in self.path.parent.glob("cuda_emulated-*.so"):
                old.unlink()
            self.beside.replace(self.path)
            self.compiler = None
        torch.ops.load_library(self.path)
        return torch.ops.fusedrnn_emulated

    def stop(self) -> None:
        """Where nobody has asked for them in the end."""
        if self.compiler is not None:
            self.compiler.kill()
            self.compiler.communicate()
            self.beside.unlink(missing_ok=True)
