#!/usr/bin/env bash
# Make .venv and install the project into it, with the versions of constraints.txt. Quick when nothing changed.
#   bash scripts/setup.sh        what running needs
#   bash scripts/setup.sh docs   and what the documentation's site needs
#   bash scripts/setup.sh dev    and what the checks need, the site among them
set -euo pipefail
cd "$(dirname "$0")/.."

extras=lora
[ "${1:-}" = docs ] && extras=lora,docs
[ "${1:-}" = dev ] && extras=lora,docs,dev

find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python bash scripts/setup.sh" >&2
    exit 1
}

stamp=.venv/.installed-$extras
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then
    exit 0
fi
python=$(find_python)
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing into .venv (torch comes first: it is the largest)" >&2
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
# Torch on its own and first: what depends on it would otherwise pick a build for us.
pip torch
pip -e ".[$extras]"
touch "$stamp"
