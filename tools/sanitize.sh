#!/usr/bin/env bash
# Builds the library with AddressSanitizer and UndefinedBehaviorSanitizer in a scratch folder and runs its tests there.
# Usage: tools/sanitize.sh [pytest arguments]; PYTHON and CXX choose the interpreter and the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r csrc sisa_kernels sisa_model tests setup.py pyproject.toml "$scratch"
cd "$scratch"
rm -f sisa_kernels/libsisa.*

sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
SISA_BUILD_CUDA=0 CXXFLAGS=$sanitize "$python" setup.py build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }
grep -q __asan_report sisa_kernels/libsisa.so || { cat build.log; exit 1; }

# Python and torch are not instrumented: the runtime goes in first, and leaks of the interpreter are not ours.
# torch.compile's tests are left out: the code it compiles would be loaded under the sanitizer too, to no purpose.
LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
PYTHONPATH=$PWD "$python" -m pytest -p no:cacheprovider -q $(grep -rlE --include='test_*.py' 'torch\.ops\.sisa' tests) \
  -k "not compile_fullgraph" "$@"
