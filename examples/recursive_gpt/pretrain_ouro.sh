#!/usr/bin/env bash
# Ouro's 1.4B (2510.25741): 24 layers looped four times, with an exit gate that learns in two stages. In the first all
# weights learn from the losses after all loops, weighed by the gate; in the second the gate alone learns which loops
# lowered the loss. (Of the published run: rates, betas and the entropy's weight; not its tokens nor its data.)
#
#   DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_ouro.sh
#   STAGE=2 START=runs/ouro SAVE=runs/ouro_gate DATA=... TOKENIZER=... bash examples/recursive_gpt/pretrain_ouro.sh
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
SAVE=${SAVE:-runs/ouro}
GPUS=${GPUS:-8}
stage=(--load "$SAVE" --train-iters 100000 --lr 3e-4 --lr-warmup-iters 2000)
if [ "${STAGE:=1}" = 2 ]; then
  stage=(--load "$SAVE" --train-iters 2000 --lr 1e-4 --lr-warmup-iters 100 --train-only heads)
  [ -s "$SAVE/latest_checkpointed_iteration.txt" ] ||
    stage+=(--load "${START:?is the result of the first stage}" --finetune --exit-on-missing-checkpoint)
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --swiglu --disable-bias-linear \
  --normalization RMSNorm --norm-epsilon 1e-6 --norm-placement sandwich --position-embedding-type rope \
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 \
  --seq-length 4096 --max-position-embeddings 4096 \
  --recursion-family looped --num-refinement-blocks 4 --exit-gate --exit-entropy-weight 0.1 \
  --micro-batch-size 1 --global-batch-size 1024 --recompute-passes \
  --lr-decay-style constant --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --bf16 \
  --data-path "$DATA" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" "${stage[@]}" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
