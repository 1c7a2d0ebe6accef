#!/usr/bin/env bash
# Compile every CUDA file of csrc/ with nvcc, where nvcc is on PATH, and throw the objects away.
# The kernels know no torch, so this needs none with CUDA, and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

# The probe of bench/cuda has its own flags; its program stays, under build/cuda/.
if command -v nvcc >/dev/null; then CUDA_ARCHS=90 bash scripts/build_cuda_probe.sh; fi

mapfile -t files < <(find csrc -name '*.cu' 2>/dev/null | sort)
if [ ${#files[@]} -eq 0 ]; then
    echo "compile_cuda: no CUDA files yet"
    exit 0
fi
if ! command -v nvcc >/dev/null; then
    echo "compile_cuda: no nvcc on PATH: ${#files[@]} CUDA file(s) not compiled"
    exit 0
fi
arch=${CUDA_ARCH:-sm_80}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for i in "${!files[@]}"; do
    printf '%s\0%s\0' "${files[i]}" "$out/$i.o"
done | xargs -0 -n 2 -P "$(nproc)" sh -c \
    "nvcc -std=c++20 -O3 -arch=$arch -Icsrc -c \"\$0\" -o \"\$1\" && echo \"nvcc $arch: \$0\""
echo "compile_cuda: ${#files[@]} CUDA file(s) compiled for $arch"
