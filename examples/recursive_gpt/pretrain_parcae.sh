#!/usr/bin/env bash
# Parcae's 140M (2604.12946): 2 layers, 2 of a core 8 times in the mean, 2 layers; the state decays, by less than 1
# whatever is learned, while the prelude's result is injected. By Muon. What it has and this has not: a norm behind the
# prelude, value embeddings, and a depth for each sequence (here for each step).
#
#   DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_parcae.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/parcae}
GPUS=${GPUS:-1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 6 --hidden-size 768 --ffn-hidden-size 3072 --num-attention-heads 6 --squared-relu --disable-bias-linear \
  --normalization RMSNorm --qk-layernorm --position-embedding-type rope --rotary-base 50000 \
  --hidden-dropout 0 --attention-dropout 0 --seq-length 2048 --max-position-embeddings 2048 \
  --recursion-family recurrent --num-prelude-layers 2 --num-coda-layers 2 --num-recurrences 8 \
  --injection diagonal --state-init sampled --state-std 0.0228 --backprop-depth 4 \
  --recurrence-distribution poisson-lognormal \
  --micro-batch-size 8 --global-batch-size 256 --train-iters 21400 \
  --optimizer muon --lr 8e-3 --min-lr 0 --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 10700 \
  --adam-beta1 0.8 --adam-beta2 0.95 --weight-decay 0.2 --clip-grad 1.0 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" --load "$SAVE" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
