#!/usr/bin/env bash
# Compile bench/cuda/ into build/cuda/probe with nvcc; no torch and no GPU needed. CUDA_ARCHS="90"
# compiles for these architectures alone, in half the time.
# CUDA's runtime and the C++ library are linked in, so it runs wherever there is a driver.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
    echo "build_cuda_probe: no nvcc on PATH" >&2
    exit 3
fi
out=build/cuda
mkdir -p "$out"
flags="-std=c++20 -O3 -Xcompiler -Wall,-Wno-unknown-pragmas -Icsrc -Ibench/cuda"
targets=
for arch in ${CUDA_ARCHS:-80 90}; do
    targets+=" -gencode arch=compute_$arch,code=[sm_$arch,compute_$arch]"
done
# One compiler a file and core; xargs fails where one of them does.
printf '%s\n' bench/cuda/*.cu | xargs -P "$(nproc)" -I{} sh -c \
    'nvcc '"$flags $targets"' -c "$1" -o "'"$out"'/$(basename "$1" .cu).o" && echo "nvcc: $1"' sh {}
objects=()
for file in bench/cuda/*.cu; do objects+=("$out/$(basename "$file" .cu).o"); done
# shellcheck disable=SC2086
nvcc $targets -cudart static -Xcompiler -static-libstdc++,-static-libgcc "${objects[@]}" \
    -o "$out/probe.new"
mv "$out/probe.new" "$out/probe"
echo "build_cuda_probe: $out/probe"
