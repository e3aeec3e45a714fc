#!/usr/bin/env bash
# The whole GPU run: report, tests of every backend, benchmarks, results as CSV.
#   tools/gpu_run.sh [doctor] [tests] [bench]      stages, default all
#
# Needs a GPU, and a Python with a CUDA torch, triton, pytest, pytest-xdist, hypothesis and tqdm; installs nothing.
# Where there is no compiler, build elsewhere and copy the tree with inpaint_kernels/_C*.so and _build_info.json:
#   TORCH_CUDA_ARCH_LIST=9.0 INPAINT_KERNELS_BUILD=cuda python setup.py build_ext --inplace
#
#   PYTHON=python3     the interpreter
#   OUT=./gpu_out      where doctor.txt, tests.log, bench.log and the CSV go
#   JOBS=4             test processes that share the GPU
#   COMMIT=...         recorded with the results where the tree has no git
#   TEST_ARGS, BENCH_ARGS   passed on
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-./gpu_out}
jobs=${JOBS:-4}
stages=${*:-doctor tests bench}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

"$python" - <<'END'
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu_run: this Python has no torch; name another one with PYTHON=")
if not torch.cuda.is_available():
    sys.exit(f"gpu_run: torch {torch.__version__} sees no CUDA device")
END

if [ ! -f inpaint_kernels/_C_cuda.so ]; then
  echo "gpu_run: no _C_cuda.so in the tree, building it"
  capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} INPAINT_KERNELS_BUILD=cuda \
    "$python" setup.py -q build_ext --inplace
fi

for stage in $stages; do
  started=$SECONDS
  echo "== $stage"
  case $stage in
    doctor) "$python" -m inpaint_kernels doctor | tee "$out/doctor.txt" ;;
    # Every backend, the CPU's too: the libraries may have been built against another torch than the one here.
    tests) "$python" -m pytest -q -n "$jobs" tests ${TEST_ARGS:-} 2>&1 | tee "$out/tests.log" ;;
    bench)
      "$python" -m inpaint_kernels bench --device cuda --out "$out" ${COMMIT:+--commit "$COMMIT"} ${BENCH_ARGS:-} \
        2>&1 | tee "$out/bench.log"
      ;;
    *) echo "gpu_run: no stage $stage; there are doctor, tests and bench"; exit 2 ;;
  esac
  echo "== $stage took $((SECONDS - started)) s"
done
