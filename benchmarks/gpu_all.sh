#!/usr/bin/env bash
# Runs every check and benchmark that needs a GPU in under 8 minutes and writes one results file:
#
#   benchmarks/gpu_all.sh [RESULTS.json]        (default: gpu_results.json; PYTHON=... chooses the interpreter)
#   python benchmarks/gpu_report.py table RESULTS.json
#
# A part that fails or exceeds its time limit does not stop the others; the file has the outcome of each. Exit code: 0 if
# all parts passed, 1 if one failed, 2 without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
results=$(realpath -m "${1:-gpu_results.json}")
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_all.sh: $python sees no CUDA device (or has no torch); nothing was run" >&2
  exit 2
fi

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
start_seconds=$SECONDS

# part NAME SECONDS COMMAND...: the command may write $parts/NAME.rows.json or, as pytest does, $parts/NAME.xml
part() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >"$parts/$name.log" 2>&1
  code=$?
  tail -n 3 "$parts/$name.log"
  printf '{"name": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$code" "$((SECONDS - start))" "$limit" >"$parts/$name.status.json"
}

part checks 120 "$python" -m pytest -q tests/gpu -p no:cacheprovider --junitxml="$parts/checks.xml"
part training 110 "$python" benchmarks/training_throughput.py --json "$parts/training.rows.json"
part opd_step 45 "$python" benchmarks/opd_step.py --json "$parts/opd_step.rows.json"
part teacher_forward 40 "$python" benchmarks/teacher_forward.py --json "$parts/teacher_forward.rows.json"
part memory 40 "$python" benchmarks/memory.py --json "$parts/memory.rows.json"
part generation 45 "$python" benchmarks/generation_throughput.py --json "$parts/generation.rows.json"
part kl 60 "$python" benchmarks/kl.py --device cuda --json "$parts/kl.rows.json"

"$python" benchmarks/gpu_report.py collect "$parts" "$results"
code=$?
echo "$results written after $((SECONDS - start_seconds)) s"
exit $code
