"""Builds the extension ``fusedrnn._C``; the rest of the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent

# Never -ffast-math, -Ofast or -march=native: linking with -ffast-math turns on flush-to-zero for
# the whole process, and -march=native makes a binary that crashes elsewhere. The kernels choose
# their instruction set at run time instead. Contraction to FMA and a silent errno are all we need.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # 64-byte vectors pass between always-inline functions only
    # Python's own flags bring -g, which makes the objects ten times larger.
    "-g" if os.environ.get("FUSEDRNN_DEBUG") == "1" else "-g0",
]
# For the kernels, which know no torch. No --use_fast_math: it would change divisions, and flush
# denormals.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra"]


def sources(pattern: str) -> list[str]:
    """Files under csrc/, relative to the root as setuptools wants them, in a stable order."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(pattern))


def cuda_version() -> str | None:
    """The version of CUDA to build the CUDA half for, or None: the CPU half alone; says which.

    It is built where torch has CUDA, nvcc is found and FUSEDRNN_CUDA=1 asks for it: no GPU has
    run it yet.
    """
    wanted = os.environ.get("FUSEDRNN_CUDA") == "1"
    if torch.version.cuda is None:
        if wanted:
            raise SystemExit("fusedrnn: FUSEDRNN_CUDA=1, but this torch was built without CUDA.")
        return None
    if wanted and CUDA_HOME is None:
        raise SystemExit("fusedrnn: FUSEDRNN_CUDA=1, but nvcc was not found: set CUDA_HOME.")
    if not wanted:
        print(f"fusedrnn: torch has CUDA {torch.version.cuda}, but fusedrnn's CUDA kernels have")
        print("fusedrnn: not been proven on a GPU yet: building the CPU half alone.")
        print("fusedrnn: FUSEDRNN_CUDA=1 builds both.")
        return None
    print(f"fusedrnn: building both halves, CUDA {torch.version.cuda}.")
    return torch.version.cuda


def extension() -> Extension:
    cuda = cuda_version()
    # The kernels, which take longest, first: no core should be left with one of them at the end.
    kernels = sources("cpu/kernels_*.cpp")
    others = [*sources("*.cpp"), *sources("cpu/*.cpp")]
    files = [*kernels, *(file for file in others if file not in kernels)]
    flags = {"cxx": CXX_FLAGS}
    make = CppExtension
    if cuda is not None:
        # Ampere, Hopper, and what comes after them by way of PTX.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        files += [*sources("cuda/*.cpp"), *sources("cuda/*.cu")]
        flags = {"cxx": [*CXX_FLAGS, f"-DFUSEDRNN_CUDA={cuda}"], "nvcc": NVCC_FLAGS}
        make = CUDAExtension
    return make(
        name="fusedrnn._C",
        sources=files,
        depends=[*sources("**/*.h"), *sources("**/*.cuh")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


class Build(BuildExtension):
    """BuildExtension with isolated system headers and a build folder that outlives the build."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # `pip install -e` compiles in a temporary folder, so each one starts from nothing.
            # In the folder that `setup.py build_ext --inplace` uses, ninja finds its objects again.
            folder = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / folder)

    def build_extension(self, ext) -> None:
        # torch's headers come in as system headers: -Wall -Wextra then speak of our code alone.
        ours = [d for d in ext.include_dirs if Path(d).resolve().is_relative_to(ROOT / "csrc")]
        theirs = [d for d in ext.include_dirs if d not in ours]
        ext.include_dirs = ours
        cxx = ext.extra_compile_args["cxx"] + [f"-isystem{d}" for d in theirs]
        ext.extra_compile_args = ext.extra_compile_args | {"cxx": cxx}
        super().build_extension(ext)


def main() -> None:
    # ninja's own default is cores + 2 compilers at once; a torch file takes over 1 GB.
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    # The same name by every way in (make exports it): ninja compiles anew where a command changes.
    if shutil.which("g++"):
        os.environ.setdefault("CXX", "g++")
    setup(ext_modules=[extension()], cmdclass={"build_ext": Build})


main()
