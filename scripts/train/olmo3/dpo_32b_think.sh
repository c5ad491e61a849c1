#!/usr/bin/env bash
# OLMo-3 32B Think, on 16 machines of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/olmo3/dpo_32b_think.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-16}
exec bash "$(dirname "$0")/../recipe.sh" olmo3/dpo_32b_think "$@"
