"""The CUDA half on the host: its operators as tests/cuda_emulated/emulated.cpp makes them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO, Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")
FIBERS = Path("/usr/include/boost/context/fiber.hpp")
SOURCE = ROOT / "tests" / "cuda_emulated" / "emulated.cpp"
# Of one kernel; on a GPU 256, which would take minutes here.
MOST_STEPS = 32


class Library:
    """Compiles the operators, once for each state of the sources, beside whatever else goes on.

    Of several test processes, the one that gets the lock compiles and the others wait for it.
    """

    def __init__(self) -> None:
        self.compiler: subprocess.Popen[bytes] | None = None
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
        flags += [f"-DFUSEDRNN_MOST_STEPS={MOST_STEPS}"]
        flags += [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        flags += [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-lboost_context"]
        state = hashlib.sha256(repr([CXX, torch.__version__, flags]).encode())
        headers = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
        for path in [*SOURCE.parent.iterdir(), *(p for p in headers if "cpu" not in p.parts)]:
            state.update(path.read_bytes())
        self.path = ROOT / "build" / f"cuda_emulated-{state.hexdigest()[:16]}.so"
        self.path.parent.mkdir(exist_ok=True)
        self.words = self.path.with_suffix(".log")
        with self._lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process compiles
            if self.path.exists():
                return
            for old in self.path.parent.glob("cuda_emulated-*"):
                old.unlink()
            unfinished = self.path.with_suffix(".tmp")
            compile_it = shlex.join(map(str, [CXX, SOURCE, *flags, "-o", unfinished]))
            # The shell keeps the lock until it ends.
            self.compiler = subprocess.Popen(
                ["sh", "-c", f"{compile_it} 2>{self.words} && mv {unfinished} {self.path}"],
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )

    def _lock(self) -> IO[str]:
        return (self.path.parent / "cuda_emulated.lock").open("w")

    def load(self) -> Any:
        """The operators, once they are compiled."""
        if self.missing:
            pytest.skip(self.missing)
        with self._lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert self.path.exists(), self.words.read_text()
        torch.ops.load_library(self.path)
        return torch.ops.fusedrnn_emulated

    def stop(self) -> None:
        """Where nobody has asked for them in the end."""
        if self.compiler is not None and self.compiler.poll() is None:
            os.killpg(self.compiler.pid, signal.SIGTERM)
            self.compiler.wait()
