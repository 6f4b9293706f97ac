#!/usr/bin/env bash
# One GPU, with the layers of present-day models: RMSNorm, SwiGLU, rotary positions, grouped queries, no biases.
#
#   DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_one_gpu.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/one_gpu}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

python "$here/pretrain_recursive_gpt.py" \
  --num-layers 12 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 12 \
  --group-query-attention --num-query-groups 4 --swiglu --disable-bias-linear --normalization RMSNorm \
  --position-embedding-type rope --untie-embeddings-and-output-weights \
  --hidden-dropout 0 --attention-dropout 0 --seq-length 2048 --max-position-embeddings 2048 \
  --num-refinement-blocks 3 --num-latent-refinements 6 \
  --micro-batch-size 4 --global-batch-size 64 --train-iters 50000 \
  --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 1000 --adam-beta2 0.95 --clip-grad 1.0 \
  --weight-decay 0.1 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
