#!/usr/bin/env bash
# Every check there is, on a fresh clone too: lint, types, import layers, tests.
# Arguments go to pytest: bash scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
bin=$PWD/.venv/bin

echo "== ruff" >&2
"$bin/ruff" check .
"$bin/ruff" format --check .

echo "== mypy" >&2
# The checkout is the package: a link with the package's name lets mypy find it.
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$PWD" "$link/dpo_cache"
MYPYPATH=$link "$bin/mypy" -p dpo_cache.pipeline -p dpo_cache.stages -m dpo_cache.cli -m dpo_cache.__main__
MYPYPATH=$link:tests:benchmarks "$bin/mypy" --explicit-package-bases tests scripts benchmarks

echo "== import layers" >&2
"$bin/lint-imports" --no-cache >&2

echo "== pytest" >&2
"$bin/pytest" -n auto --dist worksteal "$@"
