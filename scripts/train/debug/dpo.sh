#!/usr/bin/env bash
# Both stages in a minute, on one GPU or a CPU: 100 pairs, 75 updates.
#   bash scripts/train/debug/dpo.sh [OPTIONS OF dpo-train]
# MODEL and DATASET name your own, as --model and --dataset take them; without, a small model and pairs are made, which
# takes another minute. CACHE and OUTPUT name other folders.
set -euo pipefail
here=$(dirname "$0")
root=$(cd "$here/../../.." && pwd)
cache=${CACHE:-caches/debug}
output=${OUTPUT:-runs/debug}
made=${output%/}-made

if [ -z "${MODEL:-}${DATASET:-}" ] && [ ! -e "$made/reference/model.safetensors" ]; then
    python=$root/.venv/bin/python
    [ -x "$python" ] || python=python3
    "$python" "$root/scripts/demo/preferences.py" "$made/data"
    "$python" "$root/scripts/demo/reference_model.py" "$made/data/train.jsonl" "$made/reference"
fi
model=${MODEL:-$made/reference}
dataset=${DATASET:-$made/data/train.jsonl,amount=100}

bash "$here/../launch.sh" dpo-cache build --config "$here/dpo.build.yaml" --model "$model" --dataset "$dataset" --cache "$cache"
bash "$here/../launch.sh" dpo-train --config "$here/dpo.train.yaml" --cache "$cache" --output "$output" --resume "$@"
