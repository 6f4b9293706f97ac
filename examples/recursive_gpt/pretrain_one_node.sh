#!/usr/bin/env bash
# One node of 8 GPUs: 2 tensor-parallel ranks (with sequence parallelism) x 2 pipeline stages x 2 data-parallel
# replicas, whose optimizer states are split and whose communication overlaps with the computation.
#
#   DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_one_node.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/one_node}
GPUS=${GPUS:-8}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 \
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
  --num-layers 24 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 \
  --group-query-attention --num-query-groups 4 --swiglu --disable-bias-linear --normalization RMSNorm \
  --position-embedding-type rope --untie-embeddings-and-output-weights \
  --hidden-dropout 0 --attention-dropout 0 --seq-length 2048 --max-position-embeddings 2048 \
  --num-refinement-blocks 3 --num-latent-refinements 6 \
  --micro-batch-size 2 --global-batch-size 256 --train-iters 50000 \
  --lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters 1000 --adam-beta2 0.95 --clip-grad 1.0 \
  --weight-decay 0.1 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
