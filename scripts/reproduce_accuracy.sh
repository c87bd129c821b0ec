#!/usr/bin/env bash
# Does pre-gating cost accuracy? Every cell of the study, most valuable first, each a command of its own, resumable: what
# is recorded is skipped, what was cut short goes on. Tables and plots go to results/accuracy_SIZE_DATE/.
#   PREGATE_DATA=DIR JOBS=2 ./scripts/reproduce_accuracy.sh nano
#                          nano, nano_olmoe (decoder-only), smollm2_moe (a model that knows a language, made by
#                          `python -m studies.dense_to_moe runs/smollm2_moe --teach --steps 120`): two CPU cores;
#                          mini: one GPU; switch_base_8: a large one
#   ONLY='sst2_*_s1' PREGATE_DATA=DIR ./scripts/reproduce_accuracy.sh nano     only these cells and what they need
#   SECONDS_LEFT=560 …     begin no cell after so many seconds, and stop the running one then; the next call goes on
#   JOBS=2 …               so many cells at a time: on two cores, or on a GPU that one cell does not fill
#   DRY=1 …                every cell at two steps, in minutes; its figures mean nothing
#   SOURCE=DIR_OR_ID …     another conventional model to start from, in place of pre-training
#   WORK=DIR OUT=DIR …     run directories and results here, not in runs/accuracy_SIZE and results/accuracy_SIZE_DATE
#   KEEP=1 …               keep every run directory, not only those that a later cell needs
#   PYTHON=… …             another interpreter, else .venv is made
# The cells: .venv/bin/python scripts/accuracy_study.py nano --list; tables and plots again: … --render
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$#" -ne 1 ]; then
  echo "usage: PREGATE_DATA=DIR $0 nano|nano_olmoe|smollm2_moe|mini|switch_base_8" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  ./scripts/setup.sh
  PYTHON="${VENV:-.venv}/bin/python"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" scripts/accuracy_study.py "$1"
