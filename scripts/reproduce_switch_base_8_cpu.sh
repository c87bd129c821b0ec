#!/usr/bin/env bash
# The whole road at the geometry of google/switch-base-8 (random weights) on a machine without a GPU: convert both file
# forms, train two steps on real SQuAD, evaluate eight questions through the engine, and keep the figures.
#   PREGATE_DATA=DIR ./scripts/reproduce_switch_base_8_cpu.sh [RESULT_DIR]     DIR holds squad/*.parquet and t5_tokenizer
#   PYTHON=… …             another interpreter, else .venv is made
# Needs about 14 GB of memory, 20 GB of disk and ten minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PREGATE_DATA:?set PREGATE_DATA to a directory with squad/*.parquet and t5_tokenizer}"
result="${1:-results/switch_base_8_cpu_$(date +%F)}"
if [ -z "${PYTHON:-}" ]; then
  ./scripts/setup.sh
fi
python="${PYTHON:-${VENV:-.venv}/bin/python}"
run=runs/switch_base_8
mkdir -p runs
for form in bin safetensors; do
  [ -e "runs/switch-base-8-$form/config.json" ] ||
    "$python" tests/make_switch_base.py "runs/switch-base-8-$form" --form "$form" --tokenizer "$PREGATE_DATA/t5_tokenizer"
done
rm -rf "$run" runs/converted-bin runs/converted-safetensors
"$python" -m pregate.train +experiment=switch_base_squad name=switch_base_8 model.source=runs/switch-base-8-bin \
  tracking=jsonl train.steps=2 train.batch_sequences=4 train.eval_examples=8 train.log_every=1 \
  eval.examples=8 eval.batch_size=4
"$python" - "$run/conversion.json" <<'PY'
import json, os, subprocess, sys, time

rows = []
for form in ("bin", "safetensors"):
    command = f"python -m pregate.convert source=runs/switch-base-8-{form} output=runs/converted-{form}"
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command.split()[1:]])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    seconds = time.perf_counter() - began
    rows.append({"command": command, "seconds": round(seconds, 1), "peak_resident_bytes": usage.ru_maxrss * 1024})
json.dump(rows, open(sys.argv[1], "w"), indent=2)
PY
"$python" scripts/save_result.py "$run" "$result" --env PREGATE_DATA=DIR \
  "Switch-Base-8 geometry with random weights, float32, on a CPU: it shows that the real job runs, in how much memory and at what speed; the scores of two steps from random weights mean nothing."
rm -rf runs/converted-bin runs/converted-safetensors
