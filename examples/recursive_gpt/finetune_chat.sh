#!/usr/bin/env bash
# A Hugging Face model fine-tuned on conversations: prepared, packed, the loss on the assistant's words alone. The model
# of the lowest held-out loss is kept. Sizes are for a small model on a CPU: SmolLM2-135M on the five conversations beside
# this script takes minutes.
#
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct bash examples/recursive_gpt/finetune_chat.sh
#   MODEL=runs/hf CHAT=chats/train VALID=chats/valid SAVE=runs/chat bash examples/recursive_gpt/finetune_chat.sh --lr 1e-5
#
# CHAT (and VALID) are what prepare-chat reads: files or folders of ShareGPT, Alpaca, OpenAssistant or plain messages.
# RECURSION are flags of convert import: by default a plain model stays plain, and a recursive folder keeps its recursion
# (a recursive model by its cached name does with RECURSION=" ").
set -euo pipefail
MODEL=${MODEL:?is a Hugging Face model with a tokenizer: a folder, a .gguf file or a cached name}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHAT=${CHAT:-$here/conversations.jsonl}
SAVE=${SAVE:-runs/finetune_chat}
LENGTH=${LENGTH:-512}
stays=--disable-recursive-refinement
grep -qsE '"model_type": *"(recursive_gpt|ouro|nanbeige|huginn_raven|hrm_text)"' "$MODEL/config.json" && stays=
read -ra recursion <<< "${RECURSION:-$stays}"
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
prepare() {
  "$recursive" prepare-chat --input "$1" --output "$SAVE/data/$2" --tokenizer "$SAVE/start/tokenizer" \
    --seq-length "$LENGTH" --overflow split --show 1
}
prepare "$CHAT" train
# A tokenizer without a chat template has got one, with tokens of its own: the model gets rows for them.
rows=$(sed -n 's/^--vocab-size=//p' "$SAVE/start/megatron_args.txt")
if [ "$(sed -n 's/^ "vocab_size": \([0-9]*\),/\1/p' "$SAVE/data/train.idx.json")" -gt "$rows" ]; then
  rm -r "$SAVE/start"
  "$recursive" convert import --hf "$MODEL" --out "$SAVE/start" --resize-vocab "$SAVE/data/train_tokenizer" \
    "${recursion[@]}"
fi
held_out=(--split 80,20,0) # of the conversations, the last fifth
if [ -n "${VALID:-}" ]; then
  prepare "$VALID" valid
  held_out=(--valid-chat-data "$SAVE/data/valid")
fi
load=(--load "$SAVE") # goes on
[ -s "$SAVE/latest_checkpointed_iteration.txt" ] || load=(--load "$SAVE/start" --finetune --exit-on-missing-checkpoint)

"$recursive" pretrain --nproc-per-node "${GPUS:-1}" "@$SAVE/start/megatron_args.txt" \
  --chat-data "$SAVE/data/train" "${held_out[@]}" --seq-length "$LENGTH" --train-epochs 3 \
  --micro-batch-size 1 --global-batch-size "${GPUS:-1}" --num-workers 0 \
  --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0 --clip-grad 1.0 \
  --log-interval 1 --eval-interval 5 --eval-iters 50 --keep-best \
  --generate-interval 5 --generation-prompt "What does a recursive language model repeat?" \
  --save "$SAVE" "${load[@]}" --save-interval 20 \
  "$@"
echo "chat with the best one: $recursive generate --model $SAVE/best --interactive"
