#!/usr/bin/env bash
# Everything worth measuring on a machine with one GPU, most valuable first, resumable: a part that has left its result
# under OUT is skipped, and a benchmark that was cut short goes on with its next row. Without a GPU it runs on the CPU.
#   OUT=DIR ./scripts/gpu_suite.sh        PYTHON=… for another interpreter; OUT defaults to runs/gpu_suite
#   PARTS="gpu_tests fig10" ./scripts/gpu_suite.sh        only these
#   EXTRA="bench.new_tokens=8 bench.models=[nano_switch]" ./scripts/gpu_suite.sh        a dry run of the benchmarks
#
# Time plan on an H200-class machine (estimates, not measurements):
#   1 environment and GPU tests                 2 min
#   2 Figures 10 to 12, 14 (host memory)        8 min
#   3 Figure 15 and 16 (Switch-Large-128)       8 min
#   4 quickstart end to end                     2 min
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${OUT:-runs/gpu_suite}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$out"

part() { # name command...
  local name="$1"
  shift
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
  if [ -e "$out/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name"
  if timeout "${PART_SECONDS:-540}" "$@" >>"$out/$name.log" 2>&1; then
    touch "$out/$name.done"
  else
    echo "   failed or out of time, see $out/$name.log"
  fi
  tail -n 30 "$out/$name.log"
}

bench() { # name experiment override...
  local name="$1" experiment="$2"
  shift 2
  # shellcheck disable=SC2086 # EXTRA is a list of overrides
  part "$name" "$python" -m pregate.bench "+experiment=$experiment" tracking=jsonl resume=true run_dir="$out/$name" \
    "$@" ${EXTRA:-}
}

part environment "$python" -c 'from pregate.runtime import environment; import json; print(json.dumps(environment(), indent=1))'
part gpu_tests "$python" -m pytest -m gpu
bench fig11 fig11_throughput
bench fig10 fig10_block_latency
bench fig15 fig15_cache
bench fig16 fig16_disk
bench fig14 fig14_active_experts
bench fig12 fig12_peak_memory
part quickstart "$python" -m pregate.train +experiment=quickstart tracking=jsonl resume=true run_dir="$out/quickstart"

echo "== results: $(find "$out" -name bench.md -o -name eval.json | sort | tr '\n' ' ')"
