#!/usr/bin/env bash
# OLMo-3.1 32B Instruct: score the pairs once with the reference, then train from the cache.
#   bash scripts/train/olmo3/dpo_32b_instruct.sh [OPTIONS OF dpo-train]
# Both commands continue where they were stopped. CACHE and OUTPUT name other folders; docs/multi-node.md says how to
# start it on several machines. All numbers, and where they come from, are in the two YAML files.
set -euo pipefail
here=$(dirname "$0")
cache=${CACHE:-caches/olmo3-32b-instruct}
output=${OUTPUT:-runs/olmo3-32b-instruct}
export NODES=${NODES:-8}

bash "$here/../launch.sh" dpo-cache build --config "$here/dpo_32b_instruct.build.yaml" --cache "$cache"
bash "$here/../launch.sh" dpo-train --config "$here/dpo_32b_instruct.train.yaml" --cache "$cache" --output "$output" --resume "$@"
