#!/usr/bin/env bash
# A Hugging Face model trained on with text of one's own, each token once. The model of the lowest held-out loss is kept.
# Sizes are for a small model on a CPU.
#
#   MODEL=HuggingFaceTB/SmolLM2-135M TEXT=notes.jsonl bash examples/recursive_gpt/finetune_text.sh
#
# TEXT is what preprocess reads: .jsonl, Parquet or text files, or folders of them.
# RECURSION are flags of convert import: by default a plain model stays plain, and a recursive folder keeps its recursion
# (a recursive model by its cached name does with RECURSION=" ").
set -euo pipefail
MODEL=${MODEL:?is a Hugging Face model with a tokenizer: a folder, a .gguf file or a cached name}
TEXT=${TEXT:?is a file or a folder of documents, as preprocess reads them}
SAVE=${SAVE:-runs/finetune_text}
stays=--disable-recursive-refinement
grep -qsE '"model_type": *"(recursive_gpt|ouro|nanbeige|huginn_raven|hrm_text)"' "$MODEL/config.json" && stays=
read -ra recursion <<< "${RECURSION:-$stays}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recursive=$(cd "$here/../.." && pwd)/.venv/bin/megatron-recursive
[ -x "$recursive" ] || recursive=megatron-recursive # installed elsewhere: by name
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=1

mkdir -p "$SAVE"
made="$MODEL${recursion[*]:+ ${recursion[*]}}"
if [ ! -e "$SAVE/start/latest_checkpointed_iteration.txt" ]; then
  echo "$made" > "$SAVE/start.txt"
  "$recursive" convert import --hf "$MODEL" --out "$SAVE/start" "${recursion[@]}"
elif [ "$made" != "$(cat "$SAVE/start.txt" 2> /dev/null || echo "$made")" ]; then
  echo "error: $SAVE goes on from $(cat "$SAVE/start.txt"); name another SAVE for $made." >&2
  exit 2
fi
"$recursive" preprocess --input "$TEXT" --output "$SAVE/data/text" --tokenizer "$SAVE/start/tokenizer"
load=(--load "$SAVE") # goes on
[ -s "$SAVE/latest_checkpointed_iteration.txt" ] || load=(--load "$SAVE/start" --finetune --exit-on-missing-checkpoint)

"$recursive" pretrain --nproc-per-node "${GPUS:-1}" "@$SAVE/start/megatron_args.txt" \
  --data-path "$SAVE/data/text" --split 90,10,0 --seq-length 256 --train-epochs 1 \
  --micro-batch-size 1 --global-batch-size $((4 * ${GPUS:-1})) --num-workers 0 \
  --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0 --clip-grad 1.0 \
  --log-interval 1 --eval-interval 10 --eval-iters 4 --keep-best \
  --save "$SAVE" "${load[@]}" --save-interval 20 \
  "$@"
echo "what the best one says: $recursive generate --model $SAVE/best --prompt 'Once upon a time'"
