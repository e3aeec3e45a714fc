#!/usr/bin/env bash
# All that a GPU has to say about the kernels, in under ten minutes and without installing anything.
#   tools/gpu_run.sh [--device cpu] [stage ...]      `--device cpu` rehearses it: the CPU's kernels, Triton interpreted
#
#   stage       ends at   what                                                              bit of the exit code
#   report          30 s  nvidia-smi, doctor                                                  1
#   smoke           80 s  tools/gpu_smoke.py: every op and backend                            2
#   sanitizer      160 s  the same under compute-sanitizer, beside smoke and cuda             4
#   cuda           160 s  tests of the CUDA kernels, the riskiest first                       8
#   triton         280 s  tests of the Triton kernels, covering rows                         16
#   fill           280 s  fills torch.compile's cache for bench, beside cuda and triton      32
#   bench          570 s  benchmarks/gpu_priority.txt, alone on the machine                  64
#
# A stage begins when the one before has ended, and its time is up at the second above, counted from the start. None
# stops the next; the exit code is the sum of the bits of those that were red. It needs torch with CUDA, triton,
# pytest, pytest-xdist, hypothesis and numpy, and the libraries built (CONTRIBUTING.md says how to bring them).
#
#   PYTHON=python3     the interpreter
#   OUT=./gpu_out      where the seven files of results go; CONTRIBUTING.md lists them
#   JOBS=14            processes of the tests and of smoke
#   ENDS="30 80 160 280 570"      when report, smoke, cuda, triton and bench end
#   COMMIT=...         recorded with the rows where the tree has no git
#   SMOKE_ARGS, TEST_ARGS, BENCH_ARGS   passed on; BENCH_ARGS to fill and bench
set -uo pipefail
cd "$(dirname "$0")/.."
began=$(date +%s)
all=(report smoke sanitizer cuda triton fill bench)

device=cuda
if [ "${1:-}" = --device ]; then
  device=${2:-}
  shift 2
fi
stages=("$@")
[ $# -gt 0 ] || stages=("${all[@]}")
for name in "${stages[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "gpu_run: no stage $name; there are: ${all[*]}"; exit 128; }
done
[[ $device == cuda || $device == cpu ]] || { echo "gpu_run: --device $device; allowed: cuda, cpu"; exit 128; }

python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-./gpu_out}")
jobs=${JOBS:-14}
read -r report_end smoke_end cuda_end triton_end bench_end <<<"${ENDS:-30 80 160 280 570}"
work=$(mktemp -d)
mkdir -p "$out"
rm -f "$out"/{summary,report,smoke,tests,bench,failures}.txt
export PYTHONPATH="$PWD:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What one stage compiles the next one finds.
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
compiled=cuda tiny=()
triton=(INPAINT_KERNELS_TEST_BACKENDS=triton INPAINT_KERNELS_TEST_ROWS=covering)
if [ "$device" = cpu ]; then
  compiled=cpu tiny=(--tiny)
  triton+=(TRITON_INTERPRET=1)
fi
# What is in the background ends with the script.
trap 'for job in $(jobs -p); do pkill -P "$job"; done; rm -rf "$work"' EXIT

# Seconds until a second counted from the start.
left() { echo $((began + $1 - $(date +%s))); }

# within END COMMAND: runs it until then; 124 when it had to be stopped.
within() {
  local limit
  limit=$(left "$1")
  [ "$limit" -gt 0 ] || return 124
  timeout -k 5 "$limit" "${@:2}"
}

# stage NAME FILE COMMAND: unless it was not asked for, appends the output to FILE and what came of it to the summary.
stage() {
  [[ " ${stages[*]} " == *" $1 "* ]] || return 0
  local code started=$SECONDS result=ok
  "${@:3}" >>"$out/$2" 2>&1
  code=$?
  [ $code -eq 0 ] || result="RED ($code)"
  [ $code -ne 124 ] || result="RED (stopped at its time limit)"
  echo "== $1: $result, second $started to $SECONDS" >>"$out/summary.txt"
  echo "== $1: $result, second $started to $SECONDS; the end of $2:"
  tail -n "${TAIL:-12}" "$out/$2"
}

report() {
  date -u
  command -v nvidia-smi >/dev/null && within "$report_end" nvidia-smi
  within "$report_end" "$python" -c '
import sys, torch
from inpaint_kernels.__main__ import main
code = main(["doctor"])
torch.zeros(1, device=sys.argv[1])
sys.exit(code)' "$device"
}

smoke() {
  # shellcheck disable=SC2086
  within "$1" "$python" tools/gpu_smoke.py --device "$device" "${tiny[@]}" --jobs "$jobs" --until $((began + $1 - 3)) \
    --failures "$out/failures.txt" "${@:2}" ${SMOKE_ARGS:-}
}

# The riskiest first, each file once; last those that compile for long.
test_files() {
  local ops=(partial_conv_kernels partial_conv values gram style total_variation inpainting_pixel pixel masked_l1 hole_valid
    feature_distance stacked_images lpips ssim ms_ssim mask_operators training derivatives objective_partial_conv
    objective_parity objective_training)
  local found late='_(training|derivatives)\.py'
  found=$(for op in "${ops[@]}"; do printf '%s\n' tests/test_"$op"*.py; done | awk '!seen[$0]++')
  grep -Ev "$late" <<<"$found"
  grep -E "$late" <<<"$found"
}

# The last test begins fifteen seconds before the end: for what is still running and for pytest's own end.
tests() {
  # shellcheck disable=SC2046,SC2086
  within "$1" env OMP_NUM_THREADS=1 "${@:2}" "$python" -m pytest -q -n "$jobs" --maxschedchunk 16 -p pytest_gpu \
    -p no:cacheprovider --tb=short --no-summary --failures "$out/failures.txt" --until $((began + $1 - 15)) \
    --without size=batch ${TEST_ARGS:-$(test_files)}
}

bench() {
  # shellcheck disable=SC2086
  within "$1" "${@:3}" "$python" -m benchmarks.run --device "$device" "${tiny[@]}" --out "$out" \
    --priority benchmarks/gpu_priority.txt --failures "$out/failures.txt" --deadline "$(($(left "$1") - $2))" \
    ${COMMIT:+--commit "$COMMIT"} ${BENCH_ARGS:-}
}

# Out of time is what it usually is; bench compiles the rest.
fill() {
  BENCH_ARGS="--compile-only ${BENCH_ARGS:-}" TORCHINDUCTOR_COMPILE_THREADS=4 bench "$triton_end" 15 nice -n 10 env \
    || [ $? -eq 124 ]
}

# A case that takes the device or the process with it costs this process alone: the next one begins behind that case.
benchmarks() {
  local code=0 red=0
  while BENCH_ARGS="--resume $work/begun ${BENCH_ARGS:-}" bench "$bench_end" 15 env; code=$?; [ $code -gt 1 ]; do
    red=$code
    [ $code -ne 124 ] && [ "$(left "$bench_end")" -gt 0 ] || break
  done
  return $((code > red ? code : red))
}

stage report report.txt report
# A few at a time: beside them smoke compiles.
stage sanitizer smoke.txt smoke "$cuda_end" --sanitizer --jobs 4 &
stage smoke smoke.txt smoke "$smoke_end"
stage fill bench.txt fill &
stage cuda tests.txt tests "$cuda_end" INPAINT_KERNELS_TEST_BACKENDS="$compiled"
stage triton tests.txt tests "$triton_end" "${triton[@]}"
wait
TAIL=60 stage bench bench.txt benchmarks
rm -f "$out"/*.partial

echo "== summary"
cat "$out/summary.txt"
[ ! -s "$out/failures.txt" ] || echo "$(grep -c '^[^ ]' "$out/failures.txt") failures in $out/failures.txt"
code=0
for i in "${!all[@]}"; do
  if grep -q "^== ${all[i]}: RED" "$out/summary.txt"; then code=$((code + (1 << i))); fi
done
exit $code
