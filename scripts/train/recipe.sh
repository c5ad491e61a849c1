#!/usr/bin/env bash
# Score the pairs of a recipe once with the reference, then train from the cache.
#   bash scripts/train/recipe.sh olmo2/dpo_7b [OPTIONS OF dpo-train]
# Both commands continue where they were stopped. All numbers, and where they come from, are in the two YAML files of
# the recipe. docs/multi-node.md says how to start it on several machines.
#
# CACHE    folder of the cache [default: caches/olmo2-7b, after the recipe]
# OUTPUT   folder of the run [default: runs/olmo2-7b]
# NODES    machines [default: the recipe's own number]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
recipe=$1
shift
name=$(echo "${recipe/\/dpo_/-}" | tr _ -)
cache=${CACHE:-caches/$name}
output=${OUTPUT:-runs/$name}

bash "$here/launch.sh" dpo-cache build --config "$here/$recipe.build.yaml" --cache "$cache"
bash "$here/launch.sh" dpo-train --config "$here/$recipe.train.yaml" --cache "$cache" --output "$output" --resume "$@"
