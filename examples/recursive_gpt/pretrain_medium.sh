#!/usr/bin/env bash
# 12 layers of width 768, 3 blocks of 6 latent refinements: research runs. One GPU, or data parallelism over GPUS.
#
#   DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_medium.sh
#   GPUS=4 DATA=... VOCAB=... MERGES=... bash examples/recursive_gpt/pretrain_medium.sh --train-iters 20000
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
VOCAB=${VOCAB:?is the vocab.json of a GPT-2 tokenizer}
MERGES=${MERGES:?is the merges.txt beside it}
SAVE=${SAVE:-runs/medium}
GPUS=${GPUS:-1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024 \
  --num-refinement-blocks 3 --num-latent-refinements 6 --halt-loss-weight 1.0 \
  --micro-batch-size 4 --global-batch-size 32 --train-iters 100000 \
  --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --clip-grad 1.0 --weight-decay 0.1 --bf16 \
  --data-path "$DATA" --split 949,50,1 --vocab-file "$VOCAB" --merge-file "$MERGES" \
  --log-interval 100 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
