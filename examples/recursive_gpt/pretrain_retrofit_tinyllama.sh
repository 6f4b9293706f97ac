#!/usr/bin/env bash
# TinyLlama-1.1B made recurrent (2511.07384): 4 layers, 8 of a core up to 16 times, 4 layers, in two phases: healing on
# web text while the depth grows, then the task (or a mixture: DATA="0.5 WEB 0.5 TASK") at full depth.
#
#   megatron-recursive convert import --hf TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --out runs/tinyllama \
#     --preset TinyLlama-1.1B --num-recurrences 16 --recurrence-step 1 --injection concat --state-init sampled \
#     --state-std 0.0087
#   export TOKENIZER=runs/tinyllama/tokenizer
#   START=runs/tinyllama DATA=WEB SAVE=runs/healed bash examples/recursive_gpt/pretrain_retrofit_tinyllama.sh
#   PHASE=task START=runs/healed DATA=TASK SAVE=runs/task bash examples/recursive_gpt/pretrain_retrofit_tinyllama.sh
#
# OPTIMIZER is ellis_adam, adam or muon, each with the learning rate that was published with it.
set -euo pipefail
DATA=${DATA:?is the prefix of the token files of tools/preprocess_data.py, without .bin; or weights and prefixes}
TOKENIZER=${TOKENIZER:?is a Hugging Face tokenizer, as a folder or a name}
START=${START:?is the checkpoint to start from: the import, or the result of the first phase}
SAVE=${SAVE:-runs/retrofit_tinyllama}
GPUS=${GPUS:-8}
read -ra data <<< "$DATA"
case ${OPTIMIZER:=ellis_adam} in
  muon) optimizer=(--optimizer muon --lr 1e-3 --decoupled-lr 5e-5) ;; # 5e-5: of embedding and output layer
  *) optimizer=(--optimizer "$OPTIMIZER" --lr 5e-5) ;;
esac
case ${PHASE:=heal} in
  heal) phase=(--recurrence-curriculum 1-sqrt --recurrence-curriculum-fraction 0.75 --train-iters 26000) ;;
  task) phase=(--train-iters 24000) ;;
  *) echo "PHASE is heal or task, not $PHASE" >&2 && exit 2 ;;
esac
load=(--load "$SAVE") # goes on
[ -s "$SAVE/latest_checkpointed_iteration.txt" ] || load=(--load "$START" --finetune --exit-on-missing-checkpoint)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_DEVICE_MAX_CONNECTIONS=1

torchrun --standalone --nproc_per_node "$GPUS" "$here/pretrain_recursive_gpt.py" \
  --num-layers 16 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32 \
  --group-query-attention --num-query-groups 4 --swiglu --disable-bias-linear --normalization RMSNorm \
  --norm-epsilon 1e-5 --position-embedding-type rope --untie-embeddings-and-output-weights \
  --hidden-dropout 0 --attention-dropout 0 --seq-length 1024 --max-position-embeddings 2048 \
  --recursion-family recurrent --num-prelude-layers 4 --num-coda-layers 4 --num-recurrences 16 \
  --injection concat --state-init sampled --state-std 0.0087 --embedding-multiplier 1 --backprop-depth 8 \
  --recurrence-distribution poisson-lognormal "${phase[@]}" \
  --micro-batch-size 4 --global-batch-size 1024 --recompute-passes \
  "${optimizer[@]}" --min-lr 0 --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 2500 \
  --lr-warmup-iters 250 --adam-beta2 0.95 --weight-decay 1e-4 --clip-grad 1.0 --bf16 \
  --data-path "${data[@]}" --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
  --log-interval 10 --eval-interval 1000 --eval-iters 10 \
  --save "$SAVE" "${load[@]}" --save-interval 1000 --tensorboard-dir "$SAVE/tensorboard" \
  "$@"
