#!/usr/bin/env bash
# The medium run with gradient through all 21 passes instead of the last block's 7: three times their activations.
# The same variables as pretrain_medium.sh; further flags go to pretrain_recursive_gpt.py.
#
#   DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_full_gradient.sh
set -euo pipefail
export SAVE=${SAVE:-runs/full_gradient}
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_medium.sh" --no-detach-between-refinements "$@"
