#!/usr/bin/env bash
# Tülu-3 70B, on 8 machines of 8 GPUs unless NODES says otherwise: see ../recipe.sh
#   bash scripts/train/tulu3/dpo_70b.sh [OPTIONS OF dpo-train]
export NODES=${NODES:-8}
exec bash "$(dirname "$0")/../recipe.sh" tulu3/dpo_70b "$@"
