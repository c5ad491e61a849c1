#!/usr/bin/env bash
# OLMo-3.1 32B Instruct, on 8 machines of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/olmo3/dpo_32b_instruct.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-8}
exec bash "$(dirname "$0")/../recipe.sh" olmo3/dpo_32b_instruct "$@"
