#!/usr/bin/env bash
# The whole story on a laptop: make a preference dataset and a small reference model, score the pairs once with two
# workers, train twice from the cache with two ZeRO-3 processes each, and compare. A few minutes on two CPU cores.
#   bash scripts/demo.sh [FOLDER]      default: demo-output
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
bin=$PWD/.venv/bin
out=${1:-demo-output}
if [ -e "$out" ] && [ ! -e "$out/.made-by-the-demo" ]; then
    echo "$out exists and was not made by this demo: name another folder" >&2
    exit 1
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.made-by-the-demo"

say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }
run() {
    printf '\033[2m$ %s\033[0m\n' "$*" >&2
    "$bin/$1" "${@:2}"
}
gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=$([ "$gpus" -eq 1 ] && echo 1 || echo 2)

say "1/5  A small preference dataset and a small reference model"
"$bin/python" scripts/demo/preferences.py "$out/data"
"$bin/python" scripts/demo/reference_model.py "$out/data/train.jsonl" "$out/reference"

build() {
    run dpo-cache build --model "$out/reference" --dataset "$out/data/$2.jsonl" --mixture "$2" \
        --cache "$out/cache" --num-workers "$processes" --json >"$out/$1.json"
}
train() {
    run dpo-train --cache "$out/cache" --mixture train --eval-mixture held-out --output "$out/$1" --beta "$2" \
        --learning-rate 2e-5 --global-batch-size 32 --tokens-per-microbatch 2048 --num-gpus "$processes" --json >"$out/$1.json"
}

say "2/5  Score the pairs once with the reference"
build build-first train
build build-held-out held-out
say "3/5  Train with beta 2: no reference model is loaded"
train beta-2 2
say "4/5  Again with beta 10: the cache is complete, nothing is scored"
build build-second train
train beta-10 10
say "5/5  Results"
"$bin/dpo-report" "$out/beta-2" "$out/beta-10" -o "$out/report.html"
"$bin/python" scripts/demo/table.py "$out"
