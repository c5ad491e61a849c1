#!/usr/bin/env bash
# OLMo-2 32B: score the pairs once with the reference, then train from the cache.
#   bash scripts/train/olmo2/dpo_32b.sh [OPTIONS OF dpo-train]
# Both commands continue where they were stopped. CACHE and OUTPUT name other folders; docs/multi-node.md says how to
# start it on several machines. All numbers, and where they come from, are in the two YAML files.
set -euo pipefail
here=$(dirname "$0")
cache=${CACHE:-caches/olmo2-32b}
output=${OUTPUT:-runs/olmo2-32b}
export NODES=${NODES:-4}

bash "$here/../launch.sh" dpo-cache build --config "$here/dpo_32b.build.yaml" --cache "$cache"
bash "$here/../launch.sh" dpo-train --config "$here/dpo_32b.train.yaml" --cache "$cache" --output "$output" --resume "$@"
