"""Builds the extension ``fusedrnn._C``; the rest of the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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


def sources(pattern: str) -> list[str]:
    """Files under csrc/, relative to the root as setuptools wants them, in a stable order."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(pattern))


def cuda_sources() -> list[str]:
    """The CUDA half, once it exists: csrc/cuda/ops_cuda.cpp and csrc/cuda/*.cu.

    It will turn the extension into a CUDAExtension with its own nvcc flags. Until then a torch
    with CUDA gets the CPU half alone, and is told so.
    """
    if torch.version.cuda is not None:
        print(f"fusedrnn: torch has CUDA {torch.version.cuda}, but this version of fusedrnn has")
        print("fusedrnn: no CUDA kernels yet: building the CPU half alone.")
    return []


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
        ext.extra_compile_args = ext.extra_compile_args + [f"-isystem{d}" for d in theirs]
        super().build_extension(ext)


def main() -> None:
    # ninja's own default is cores + 2 compilers at once; a torch file takes over 1 GB.
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    # The same name by every way in (make exports it): ninja compiles anew where a command changes.
    if shutil.which("g++"):
        os.environ.setdefault("CXX", "g++")
    extension = CppExtension(
        name="fusedrnn._C",
        sources=[*sources("*.cpp"), *sources("cpu/*.cpp"), *cuda_sources()],
        depends=sources("**/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-fopenmp"],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})


main()
