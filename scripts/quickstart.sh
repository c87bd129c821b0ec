#!/usr/bin/env bash
# The whole road on this machine, nothing to download but packages: train a small conventional Switch, convert it,
# fine-tune it pre-gated, compare the two, and serve it from the offloading engine under four policies.
#   ./scripts/quickstart.sh [override ...]      for example  ./scripts/quickstart.sh pregate=lookahead_2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
run_dir="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
"${VENV:-.venv}/bin/python" -m pregate.train +experiment=quickstart run_dir="$run_dir" "$@"
