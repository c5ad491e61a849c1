#!/usr/bin/env bash
# Tülu-3 70B: score the pairs once with the reference, then train from the cache.
#   bash scripts/train/tulu3/dpo_70b.sh [OPTIONS OF dpo-train]
# Both commands continue where they were stopped. CACHE and OUTPUT name other folders; docs/multi-node.md says how to
# start it on several machines. All numbers, and where they come from, are in the two YAML files.
set -euo pipefail
here=$(dirname "$0")
cache=${CACHE:-caches/tulu3-70b}
output=${OUTPUT:-runs/tulu3-70b}
export NODES=${NODES:-8}

bash "$here/../launch.sh" dpo-cache build --config "$here/dpo_70b.build.yaml" --cache "$cache"
bash "$here/../launch.sh" dpo-train --config "$here/dpo_70b.train.yaml" --cache "$cache" --output "$output" --resume "$@"
