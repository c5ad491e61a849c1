#!/usr/bin/env bash
# OLMo-2 32B, on 4 machines of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/olmo2/dpo_32b.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-4}
exec bash "$(dirname "$0")/../recipe.sh" olmo2/dpo_32b "$@"
