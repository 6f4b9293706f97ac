#!/usr/bin/env bash
# Several nodes, which find each other at ENDPOINT: run this once on every node, within a few minutes.
# A node holds 2 tensor-parallel ranks x 4 pipeline stages; each node is one data-parallel replica.
#
#   NNODES=4 ENDPOINT=first-node:29500 DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_multi_node.sh
#
# DATA, TOKENIZER and SAVE are on a file system that all nodes see.
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/multi_node}
NNODES=${NNODES:-2}
GPUS=${GPUS:-8}
ENDPOINT=${ENDPOINT:?is the HOST:PORT of one of the nodes}
JOB=${JOB:-recursive} # the same on all nodes, another for every job that meets at the same endpoint
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --nnodes "$NNODES" --nproc_per_node "$GPUS" \
  --rdzv_backend c10d --rdzv_endpoint "$ENDPOINT" --rdzv_id "$JOB" \
  "$here/pretrain_recursive_gpt.py" \
  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4 \
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
  --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 \
  --group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear --normalization RMSNorm \
  --position-embedding-type rope --untie-embeddings-and-output-weights \
  --hidden-dropout 0 --attention-dropout 0 --seq-length 4096 --max-position-embeddings 4096 \
  --num-refinement-blocks 3 --num-latent-refinements 6 --recompute-passes \
  --micro-batch-size 1 --global-batch-size 256 --train-iters 100000 \
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --adam-beta2 0.95 --clip-grad 1.0 \
  --weight-decay 0.1 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
