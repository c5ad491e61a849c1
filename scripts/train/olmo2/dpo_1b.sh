#!/usr/bin/env bash
# OLMo-2 1B, on 1 machine of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/olmo2/dpo_1b.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-1}
exec bash "$(dirname "$0")/../recipe.sh" olmo2/dpo_1b "$@"
