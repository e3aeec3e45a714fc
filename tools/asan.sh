#!/usr/bin/env bash
# The CPU library and its tests under AddressSanitizer and UndefinedBehaviorSanitizer, for every instruction set
# this machine has.
#   tools/asan.sh [python [pytest arguments]]       default: the tests of every op
#   SHARED=n        one test in n under one instruction set; which, SHARE=k says, so that counting it up takes turns.
#                   Default every test under each of them
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
shift || true
cxx=${CXX:-g++}

INPAINT_KERNELS_BUILD=cpu "$python" setup.py -q build_ext --sanitize --build-lib build/sanitize

if [ $# -eq 0 ]; then
  set -- tests/test_values.py
  for op in $("$python" -c 'from inpaint_kernels import _library; print(*_library.OPS)'); do
    set -- "$@" "tests/test_$op.py"
  done
fi

# Python itself is not instrumented, so the run time must come first in the process; libstdc++ is named with it
# because the run time looks for __cxa_throw when it starts.
LD_PRELOAD="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libstdc++.so)"
# Python and torch leak on purpose at exit. One wrong access ends the run.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# One malloc per object, so that an access past its end is seen.
export PYTHONMALLOC=malloc
export INPAINT_KERNELS_LIBRARY_DIR=$PWD/build/sanitize/inpaint_kernels
export INPAINT_KERNELS_TEST_BACKENDS=cpu
export LD_PRELOAD

# Every set up to the best one this machine has.
best=$("$python" -c 'from inpaint_kernels import _extension as e; print(e.status()["cpu"] or e.cpu_isa())')
isas=()
for isa in generic avx2 avx512; do
  isas+=("$isa")
  if [ "$isa" = "$best" ]; then break; fi
done
if [ "$isa" != "$best" ]; then
  echo "sanitizers: $best"
  exit 1
fi

if [ -n "${SHARED:-}" ]; then
  export TEST_SHARE=$((${SHARE:-0} / ${#isas[@]}))/$SHARED
  isas=("${isas[$((${SHARE:-0} % ${#isas[@]}))]}")
fi
for isa in "${isas[@]}"; do
  echo "== sanitizers: $isa"
  INPAINT_KERNELS_CPU_ISA=$isa OMP_NUM_THREADS=2 PYTHONPATH=tools \
    "$python" -m pytest -q -n 2 -p pytest_share -p no:cacheprovider "$@"
done
