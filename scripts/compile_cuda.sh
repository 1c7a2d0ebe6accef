#!/usr/bin/env bash
# Compile the CUDA half with nvcc, where nvcc is on PATH, and throw the objects away: no GPU needed.
# A kernel that spills registers is an error.
#
# Usage: compile_cuda.sh [PYTHON]
#   PYTHON  an interpreter with torch, for csrc/cuda/ops_cuda.cpp (.venv/bin/python). A torch
#           without CUDA will do: it has the headers but for one of a single line, written here.
#           The kernels know no torch at all.
# CUDA_ARCHS lists what to compile for: "80 90"; the probe is for the last of them.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
if ! command -v nvcc >/dev/null; then
    echo "compile_cuda: no nvcc on PATH: the CUDA half was not compiled"
    exit 0
fi
# The probe of bench/cuda has its own flags; its program stays, under build/cuda/.
arch=${CUDA_ARCHS:-80 90}
CUDA_ARCHS=${arch##* } bash scripts/build_cuda_probe.sh
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

gencode=""
for a in $arch; do
    gencode="$gencode -gencode arch=compute_$a,code=sm_$a"
done
warnings="-Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-psabi,-Werror"
# What a kernel keeps in registers must fit there, and be indexed by constants.
registers="-Xptxas --warn-on-spills,--warn-on-local-memory-usage"

commands=()
for file in csrc/cuda/*.cu; do
    commands+=("nvcc -std=c++20 -O3 $gencode $warnings $registers -Icsrc -c $file -o $out/$(basename "$file").o")
done
if torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)'); then
    mkdir -p "$out/stub/c10/cuda/impl"
    echo '#define C10_CUDA_BUILD_SHARED_LIBS' >"$out/stub/c10/cuda/impl/cuda_cmake_macros.h"
    # A torch with CUDA finds its own header first.
    commands+=("nvcc -x c++ -std=c++20 $warnings -Icsrc -isystem $torch/include \
-isystem $torch/include/torch/csrc/api/include -isystem $out/stub \
-c csrc/cuda/ops_cuda.cpp -o $out/ops_cuda.o")
else
    echo "compile_cuda: no torch in '$python': ops_cuda.cpp was not compiled"
fi
printf '%s\0' "${commands[@]}" | xargs -0 -n 1 -P "${MAX_JOBS:-$(nproc)}" sh -c
echo "compile_cuda: ${#commands[@]} CUDA file(s) compiled for sm_${arch// /, sm_}"
