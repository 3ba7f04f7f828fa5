#!/usr/bin/env bash
# What ten minutes of a card are for, in order of worth; every row is kept as it comes, and what has one of this card and
# this code is not measured again. So it may be stopped anywhere, and the same command goes on.
#   bash benchmarks/gpu.sh [SECONDS]      600 if not given; PYTHON and WORK may be set
#   bash benchmarks/gpu.sh --dry-run      on a CPU: every step on something small, no rows
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
WORK=${WORK:-runs/gpu}
DRY=()
LIMIT=${1:-600}
if [ "$LIMIT" = --dry-run ]; then DRY=(--dry-run) LIMIT=600 && export TRITON_INTERPRET=1; fi
failed=0

# step SHARE NAME ARGUMENTS…: a measurement, that may take a share of the time and begins while some is left
step() {
    local left=$((LIMIT - SECONDS)) seconds=$((LIMIT * $1 / 100)) name=$2
    shift 2
    if [ "$left" -lt 15 ]; then echo "== $name: no time left"; return; fi
    if [ "$seconds" -gt "$left" ]; then seconds=$left; fi
    echo "== $name, $seconds s"
    timeout $((seconds + 30)) "$PYTHON" -m "$@" --seconds "$seconds" "${DRY[@]}" || { echo "== $name failed"; failed=1; }
}

decodes=1  # what decodes wrongly is not timed; kernels are tested before their rows
if [ ${#DRY[@]} -eq 0 ]; then
    tests=(tests/packed/test_decoder.py tests/packed/test_merge_layers.py tests/packed/test_packed_linear.py)
    timeout 120 "$PYTHON" -m pytest -q -m gpu "${tests[@]}" || { echo "== the decoder's tests failed"; failed=1 decodes=0; }
fi
step 25 "kernels without rows" benchmarks.kernels --only fake_quant soft_round bitstream gptq_solve linear_soft_ce
if [ $decodes -eq 1 ]; then step 25 "decoding" benchmarks.decode; fi
step 25 "a calibration of an 8B's blocks" benchmarks.calibrate_8b --work "$WORK"
step 10 "packed products" benchmarks.kernels --only packed_matmul
step 15 "other blocks for packed products" benchmarks.kernels.sweep
exit $failed
