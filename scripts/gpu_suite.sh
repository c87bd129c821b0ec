#!/usr/bin/env bash
# Everything worth measuring on a machine with one GPU, most valuable first, resumable: a part that has left its result
# under OUT is skipped. Each part stays below nine minutes. On a machine without a GPU it runs on the CPU as a dry run.
#   OUT=DIR ./scripts/gpu_suite.sh        PYTHON=… for another interpreter; OUT defaults to runs/gpu_suite
#
# Time plan on an H200-class machine (estimates, not measurements):
#   1 environment and GPU tests        2 min
#   2 quickstart end to end            2 min
#   3 Switch-Base-8 geometry, served   3 min
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${OUT:-runs/gpu_suite}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$out"

part() { # name command...
  local name="$1"
  shift
  if [ -e "$out/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name"
  if timeout 540 "$@" >"$out/$name.log" 2>&1; then touch "$out/$name.done"; else echo "   failed, see $out/$name.log"; fi
  tail -n 25 "$out/$name.log"
}

part environment "$python" -c 'from pregate.runtime import environment; import json; print(json.dumps(environment(), indent=1))'
part gpu_tests "$python" -m pytest -m gpu
part quickstart "$python" -m pregate.train +experiment=quickstart tracking=jsonl resume=true run_dir="$out/quickstart"

base8="${SCRATCH:-/tmp}/switch-base-8-random"
[ -e "$base8/config.json" ] || "$python" tests/make_switch_base.py "$base8" --form safetensors >"$out/make_base8.log" 2>&1
[ -e "$base8-pregated/config.json" ] ||
  "$python" -m pregate.convert source="$base8" output="$base8-pregated" >"$out/convert_base8.log" 2>&1
for tier in dram disk; do
  part "base8_$tier" "$python" -m pregate.eval +experiment=quickstart checkpoint="$base8-pregated" \
    output="$out/base8_$tier" tracking=jsonl engine.tier="$tier" eval.examples=8 eval.report=false \
    engine.bench_new_tokens=64
done

echo "== results: $(find "$out" -name eval.json | sort | tr '\n' ' ')"
