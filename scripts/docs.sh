#!/usr/bin/env bash
# Build the documentation's site into site/; a dead link or a page left out of the menu ends it.
#   bash scripts/docs.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh docs
.venv/bin/python scripts/docs/command_reference.py
# Its author advertises another program at every build.
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --clean
echo "open site/index.html" >&2
