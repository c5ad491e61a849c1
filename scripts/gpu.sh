#!/usr/bin/env bash
# The checks and the benchmark that need a GPU, with an interpreter that the project is installed for.
#   bash scripts/gpu.sh                    tests of tests/gpu, then benchmarks/gpu.py
#   bash scripts/gpu.sh tests [ARGUMENTS]  the tests alone; the arguments go to pytest
#   bash scripts/gpu.sh bench [ARGUMENTS]  the benchmark alone
#   PYTHON=/path/to/python bash scripts/gpu.sh      [default: .venv's, or python3]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

what=${1:-all}
[ $# -eq 0 ] || shift
case $what in
    all)
        "$python" -m pytest tests/gpu
        "$python" benchmarks/gpu.py
        ;;
    tests) "$python" -m pytest tests/gpu "$@" ;;
    bench) "$python" benchmarks/gpu.py "$@" ;;
    *)
        echo "gpu.sh: tests or bench?" >&2
        exit 2
        ;;
esac
