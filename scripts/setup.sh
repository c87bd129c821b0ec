#!/usr/bin/env bash
# Make the virtual environment .venv with pregate and its tools at the tested versions; done once, then instant.
#   ./scripts/setup.sh            use another interpreter with PYTHON=python3.12, another place with VENV=DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-.venv}"
stamp="$venv/.pregate-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
[ -f "$stamp" ] && exit 0
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "pregate: $("$python" --version 2>&1) is too old: set PYTHON to a Python 3.11 or newer." >&2
  exit 2
}
echo "pregate: installing into $venv (about a minute) ..." >&2
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>&1 |
  grep -v '^WARNING: Location' >&2 || true
"$venv/bin/python" -c 'import hydra, pytest, torch, transformers' || {
  echo "pregate: the installation into $venv failed: see the messages above, remove $venv and try again." >&2
  exit 2
}
rm -f "$venv"/.pregate-*
touch "$stamp"
