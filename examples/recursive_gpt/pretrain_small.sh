#!/usr/bin/env bash
# 6 layers of width 512, 2 blocks of 4 latent refinements: quick experiments and debugging. One GPU, or the CPU.
#
#   DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_small.sh
#   further flags go to pretrain_recursive_gpt.py, where a later flag wins: pretrain_small.sh --train-iters 100
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
VOCAB=${VOCAB:?is the vocab.json of a GPT-2 tokenizer}
MERGES=${MERGES:?is the merges.txt beside it}
SAVE=${SAVE:-runs/small}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node 1 "$here/pretrain_recursive_gpt.py" \
  --num-layers 6 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512 \
  --num-refinement-blocks 2 --num-latent-refinements 4 \
  --micro-batch-size 8 --global-batch-size 32 --train-iters 10000 \
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 200 --clip-grad 1.0 --weight-decay 0.1 --bf16 \
  --data-path "$DATA" --split 949,50,1 --vocab-file "$VOCAB" --merge-file "$MERGES" \
  --log-interval 10 --eval-interval 500 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
