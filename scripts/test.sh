#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, format, types, tests. GPU tests skip without a GPU.
#   ./scripts/test.sh [pytest argument ...]      tests run on up to four cores at a time; -n 0 for one after the other,
#                                               -m '' for the slow ones too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
bin="${VENV:-.venv}/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright" --pythonpath "$bin/python"
"$bin/pytest" -n auto --maxprocesses 4 --dist worksteal "$@"
