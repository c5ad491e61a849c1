#!/usr/bin/env bash
# OLMo-3 7B Instruct, on 4 machines of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/olmo3/dpo_7b_instruct.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-4}
exec bash "$(dirname "$0")/../recipe.sh" olmo3/dpo_7b_instruct "$@"
