#!/usr/bin/env bash
# OLMo-2-1B made recurrent (2511.07384): 4 layers, 6 of a core up to 32 times, 4 layers, trained by Muon.
#
#   megatron-recursive convert import --hf allenai/OLMo-2-0425-1B --out runs/olmo --preset OLMo-2-0425-1B \
#     --num-recurrences 32 --recurrence-step 1 --injection concat --state-init sampled --state-std 0.0087
#   START=runs/olmo DATA=... TOKENIZER=runs/olmo/tokenizer bash examples/recursive_gpt/pretrain_retrofit_olmo.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
START=${START:?is the import of the donor, as the command above makes it}
SAVE=${SAVE:-runs/retrofit_olmo}
GPUS=${GPUS:-8}
load=(--load "$SAVE") # goes on
[ -s "$SAVE/latest_checkpointed_iteration.txt" ] || load=(--load "$START" --finetune --exit-on-missing-checkpoint)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 14 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 16 --swiglu --disable-bias-linear \
  --normalization RMSNorm --norm-epsilon 1e-6 --norm-placement post --qk-layernorm --qk-norm-scope full \
  --position-embedding-type rope --rotary-base 500000 --untie-embeddings-and-output-weights \
  --hidden-dropout 0 --attention-dropout 0 --seq-length 1024 --max-position-embeddings 4096 \
  --recursion-family recurrent --num-prelude-layers 4 --num-coda-layers 4 --num-recurrences 32 \
  --injection concat --state-init sampled --state-std 0.0087 --embedding-multiplier 1 --backprop-depth 8 \
  --recurrence-distribution poisson-lognormal --recurrence-curriculum 1-sqrt --recurrence-curriculum-fraction 0.75 \
  --micro-batch-size 4 --global-batch-size 1024 --train-iters 48000 --recompute-passes \
  --optimizer muon --lr 1e-3 --decoupled-lr 5e-5 --min-lr 0 --lr-decay-style WSD --lr-wsd-decay-style linear \
  --lr-wsd-decay-iters 4800 --lr-warmup-iters 480 --adam-beta2 0.95 --weight-decay 1e-4 --clip-grad 1.0 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" "${load[@]}" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
