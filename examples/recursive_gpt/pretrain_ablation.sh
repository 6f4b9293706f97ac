#!/usr/bin/env bash
# The ablation: the medium run with recursion off, which is Megatron's plain GPT, bit for bit.
# The same variables as pretrain_medium.sh; further flags go to pretrain_recursive_gpt.py.
#
#   DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_ablation.sh
set -euo pipefail
export SAVE=${SAVE:-runs/ablation}
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_medium.sh" --disable-recursive-refinement "$@"
