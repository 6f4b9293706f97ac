#!/usr/bin/env bash
# The medium run with gradient through the last block's 7 passes instead of all 21: a third of their activations, and
# not what learns best (section 2 of the guide). The same variables as pretrain_medium.sh; further flags go to
# pretrain_recursive_gpt.py.
#
#   DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_detached.sh
set -euo pipefail
export SAVE=${SAVE:-runs/detached}
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_medium.sh" --detach-between-refinements "$@"
