#!/usr/bin/env bash
#SBATCH --job-name=recursive
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
# pretrain_multi_node.sh once on every node of a SLURM job. A job that was requeued goes on from its last checkpoint.
# Submit it from the repository's root, since sbatch copies the script; sbatch's own flags change the lines above.
#
#   DATA=... TOKENIZER=... sbatch --nodes 4 examples/recursive_gpt/pretrain_slurm.sh
set -euo pipefail
export DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
export TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
export SAVE=${SAVE:-runs/slurm}
export GPUS=${GPUS:-8} NNODES=$SLURM_JOB_NUM_NODES JOB=recursive-$SLURM_JOB_ID
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export ENDPOINT=$first:${PORT:-29500}

srun bash examples/recursive_gpt/pretrain_multi_node.sh --exit-signal-handler "$@"
