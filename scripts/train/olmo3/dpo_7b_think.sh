#!/usr/bin/env bash
# OLMo-3 7B Think: score the pairs once with the reference, then train from the cache.
#   bash scripts/train/olmo3/dpo_7b_think.sh [OPTIONS OF dpo-train]
# Both commands continue where they were stopped. CACHE and OUTPUT name other folders; docs/multi-node.md says how to
# start it on several machines. All numbers, and where they come from, are in the two YAML files.
set -euo pipefail
here=$(dirname "$0")
cache=${CACHE:-caches/olmo3-7b-think}
output=${OUTPUT:-runs/olmo3-7b-think}
export NODES=${NODES:-4}

bash "$here/../launch.sh" dpo-cache build --config "$here/dpo_7b_think.build.yaml" --cache "$cache"
bash "$here/../launch.sh" dpo-train --config "$here/dpo_7b_think.train.yaml" --cache "$cache" --output "$output" --resume "$@"
