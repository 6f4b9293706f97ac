#!/usr/bin/env bash
# Llama-3.2-1B made recurrent (2511.07384): 2 layers, 4 of a core up to 32 times, 2 layers. From the pretrained layers
# where START names their import, else from scratch: the same model, data and steps. RECURRENCES is the mean depth.
#
#   megatron-recursive convert import --hf meta-llama/Llama-3.2-1B --out runs/llama --prelude 0-1 --core 10-13 \
#     --coda 14-15 --untie-embeddings --num-recurrences 32 --recurrence-step 1 --injection concat \
#     --state-init sampled --state-std 0.0087
#   START=runs/llama DATA=... TOKENIZER=runs/llama/tokenizer bash examples/recursive_gpt/pretrain_retrofit_llama.sh
#
# Its optimizer and depths stand as published, but for the mean of drawn depths, which is calibrated here.
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/retrofit_llama}
GPUS=${GPUS:-8}
RECURRENCES=${RECURRENCES:-32}
start=(--load "$SAVE") # goes on
[ -z "${START:-}" ] || start+=(--embedding-multiplier 1)
[ -z "${START:-}" ] || [ -s "$SAVE/latest_checkpointed_iteration.txt" ] ||
  start+=(--load "$START" --finetune --exit-on-missing-checkpoint)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 8 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 \
  --group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear --normalization RMSNorm \
  --norm-epsilon 1e-5 --position-embedding-type rope --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 32 \
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 \
  --seq-length 1024 --max-position-embeddings 131072 \
  --recursion-family recurrent --num-prelude-layers 2 --num-coda-layers 2 --num-recurrences "$RECURRENCES" \
  --injection concat --state-init sampled --state-std 0.0087 --backprop-depth 8 \
  --recurrence-distribution poisson-lognormal --recurrence-curriculum linear --recurrence-curriculum-fraction 0.25 \
  --micro-batch-size 4 --global-batch-size 1024 --train-iters 28000 --recompute-passes \
  --optimizer ellis_adam --lr 5e-5 --min-lr 0 --lr-decay-style WSD --lr-wsd-decay-style linear \
  --lr-wsd-decay-iters 2800 --lr-warmup-iters 280 --adam-beta2 0.95 --weight-decay 1e-4 --clip-grad 1.0 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" "${start[@]}" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
