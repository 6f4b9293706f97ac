#!/usr/bin/env bash
# 24 layers of width 1024, 5 blocks of 8 latent refinements, on 8 GPUs: 2 tensor-parallel ranks x 4 pipeline stages.
#
#   DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_large.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
VOCAB=${VOCAB:?is the vocab.json of a GPT-2 tokenizer}
MERGES=${MERGES:?is the merges.txt beside it}
SAVE=${SAVE:-runs/large}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node 8 "$here/pretrain_recursive_gpt.py" \
  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4 \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 \
  --num-refinement-blocks 5 --num-latent-refinements 8 --halt-loss-weight 0.5 \
  --micro-batch-size 1 --global-batch-size 128 --train-iters 500000 \
  --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --clip-grad 1.0 --weight-decay 0.1 --bf16 \
  --data-path "$DATA" --split 949,50,1 --vocab-file "$VOCAB" --merge-file "$MERGES" \
  --log-interval 100 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
