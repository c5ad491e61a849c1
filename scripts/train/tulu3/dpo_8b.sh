#!/usr/bin/env bash
# Tülu-3 8B, on 4 machines of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/tulu3/dpo_8b.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-4}
exec bash "$(dirname "$0")/../recipe.sh" tulu3/dpo_8b "$@"
