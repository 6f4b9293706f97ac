#!/usr/bin/env bash
# TRM (2510.04871) on text: 2 layers of width 512, T = 3, n = 6, weightless norms behind the sum, gradient through the
# last block, 16 optimizer steps for each batch on carried states, AdamATan2, an average of the weights. Attention is
# causal here, and each token halts by itself. An iteration is an optimizer step; an evaluation runs 16 in a row.
#
#   DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_trm.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/trm}
GPUS=${GPUS:-1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 2 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --swiglu --disable-bias-linear \
  --normalization RMSNorm --norm-placement post --output-norm-scope residual --norm-weights ones \
  --position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 \
  --seq-length 512 --max-position-embeddings 512 \
  --num-refinement-blocks 3 --num-latent-refinements 6 --detach-between-refinements \
  --state-init trunc-normal --state-norm none \
  --halt-loss-weight 0.5 --num-supervision-steps 16 --carry-halted \
  --micro-batch-size 32 --global-batch-size 768 --train-iters 50000 \
  --optimizer adam_atan2 --lr 1e-4 --lr-decay-style constant --lr-warmup-iters 2000 --adam-beta2 0.95 \
  --weight-decay 0.1 --clip-grad 1.0 --ema-decay 0.999 --evaluate-ema --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
