#!/usr/bin/env bash
# Compile the CUDA half with nvcc, where nvcc is on PATH, and throw the objects away: no GPU needed.
# A kernel that spills registers is an error.
#
# Usage: compile_cuda.sh kernels
#        compile_cuda.sh ops [PYTHON]
#   kernels  the kernels and the probe of bench/cuda, which know no torch
#   ops      csrc/cuda/ops_cuda.cpp
#   PYTHON   an interpreter with torch (.venv/bin/python). A torch without CUDA will do: it has the
#            headers but for one of a single line, written here.
# CUDA_ARCHS lists what to compile for: "80 90"; the probe is for the last of them.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
    echo "compile_cuda: no nvcc on PATH: the CUDA half was not compiled"
    exit 0
fi
arch=${CUDA_ARCHS:-80 90}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
warnings="-Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-psabi,-Werror"

case "${1:-}" in
kernels)
    # The probe has its own flags; its program stays, under build/cuda/.
    CUDA_ARCHS=${arch##* } bash scripts/build_cuda_probe.sh
    gencode=""
    for a in $arch; do
        gencode="$gencode -gencode arch=compute_$a,code=sm_$a"
    done
    # What a kernel keeps in registers must fit there, and be indexed by constants.
    registers="-Xptxas --warn-on-spills,--warn-on-local-memory-usage"
    files=(csrc/cuda/*.cu)
    for file in "${files[@]}"; do
        printf '%s\0' "nvcc -std=c++20 -O3 $gencode $warnings $registers -Icsrc -c $file \
-o $out/$(basename "$file").o"
    done | xargs -0 -n 1 -P "${MAX_JOBS:-$(nproc)}" sh -c
    echo "compile_cuda: ${#files[@]} CUDA files compiled for sm_${arch// /, sm_}"
    ;;
ops)
    python=${2:-.venv/bin/python}
    torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
    mkdir -p "$out/stub/c10/cuda/impl"
    echo '#define C10_CUDA_BUILD_SHARED_LIBS' >"$out/stub/c10/cuda/impl/cuda_cmake_macros.h"
    # A torch with CUDA finds its own header first.
    # shellcheck disable=SC2086
    nvcc -x c++ -std=c++20 $warnings -Icsrc -isystem "$torch/include" \
        -isystem "$torch/include/torch/csrc/api/include" -isystem "$out/stub" \
        -c csrc/cuda/ops_cuda.cpp -o "$out/ops_cuda.o"
    echo "compile_cuda: ops_cuda.cpp compiled"
    ;;
*)
    echo "compile_cuda: expected kernels or ops, got '${1:-}'" >&2
    exit 2
    ;;
esac
