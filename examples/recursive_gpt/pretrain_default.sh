#!/usr/bin/env bash
# The main job on an embedded default: real English text, a tokenizer, a recursive GPT that trains, stops, resumes,
# evaluates, draws its curves and writes a report. Minutes on two CPU cores; one rank per GPU where there are GPUs.
#
#   make pretrain                      everything, into runs/default
#   make pretrain ARGS="--lr 1e-3"     further flags go to pretraining
#   RUN=runs/other make pretrain       into another folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run=${RUN:-runs/default}
iterations=300
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
bin=.venv/bin/
[ -x "${bin}megatron-recursive" ] || bin= # installed elsewhere: by name
recursive=${bin}megatron-recursive
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
stages=$((ranks % 2 == 0 ? 2 : 1)) # an even number of ranks: two pipeline stages, and data parallelism over the pairs

say() { printf '\n== %s\n' "$*"; }
step() { printf '\n$ %s\n' "$*"; "$@"; }

say "1/6 a corpus of English from what CPython ships, a tokenizer, and token files (kept: rm -r $run makes them anew)"
[ -e "$run/data/valid.jsonl" ] || step "$recursive" corpus --output "$run/data"
[ -e "$run/tokenizer/tokenizer.json" ] ||
  step "$recursive" tokenizer --input "$run/data/train.jsonl" --output "$run/tokenizer" --vocab-size 4096
for split in train valid; do
  [ -e "$run/data/$split.idx" ] ||
    step "$recursive" preprocess --input "$run/data/$split.jsonl" --output "$run/data/$split" \
      --tokenizer "$run/tokenizer" --workers 2
done

# 0.088 is 1 / sqrt(width), where a recursion starts unasked; given, so that the ablation starts there too.
train=(
  "$recursive" pretrain --nproc-per-node "$ranks"
  --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --swiglu --disable-bias-linear
  --normalization RMSNorm --position-embedding-type rope --seq-length 128 --max-position-embeddings 128
  --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.088
  --num-refinement-blocks 2 --num-latent-refinements 1
  --train-data-path "$run/data/train" --valid-data-path "$run/data/valid"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer" --num-workers 0
  --pipeline-model-parallel-size "$stages"
  --micro-batch-size $((4 / stages)) --global-batch-size $((4 * ranks)) --train-iters "$iterations"
  --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-iters 30 --clip-grad 1.0
  --weight-decay 0.1 --adam-beta2 0.95
  --log-interval 10 --eval-interval 100 --eval-iters 8
  --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 100
  --tensorboard-dir "$run/tensorboard" --tensorboard-log-interval 10 "$@"
)
tracker=$run/checkpoints/latest_checkpointed_iteration.txt
if [ -s "$tracker" ]; then
  say "2/6 $run/checkpoints holds iteration $(cat "$tracker"): nothing to do before it goes on from there"
else
  say "2/6 training, up to the stop at iteration 200"
  step "${train[@]}" --exit-interval 200
fi
say "3/6 the same command again: it resumes from the checkpoint and goes on to the end"
step "${train[@]}"
say "4/6 the curves"
step "$recursive" plot "$run" --output "$run/loss_curve.png"
say "5/6 summary"
step "$recursive" summarize "$run"
say "6/6 the report: is the recursion used, what does depth buy, what does it cost"
step "$recursive" report "$run" --measure --text "$run/data/valid" --tokenizer "$run/tokenizer" \
  --prompt "The function returns"
compare="  $recursive summarize $run runs/plain
          $recursive report $run runs/plain --output runs/comparison.html"
ablation="the ablation, which passes the same layers once, and the two runs side by side:
          RUN=runs/plain make pretrain ARGS=--disable-recursive-refinement"
if [[ " $* " == *" --disable-recursive-refinement "* ]]; then
  compare=${compare//$run runs\/plain/runs/default $run}
  ablation="this ablation beside the recursive run:"
fi
cat <<TEXT

files:  the report in $run/report.html, which any browser opens, with what it measured beside it;
        checkpoints, metrics.jsonl and logs in $run/checkpoints, curves in $run/loss_curve.png,
        TensorBoard events in $run/tensorboard, corpus and tokens in $run/data, tokenizer in $run/tokenizer
next:   $ablation
        $compare
        what it says, and the model for transformers:
          $recursive generate --model $run/checkpoints --prompt "The function returns" --exit halting
          $recursive convert export --ckpt $run/checkpoints --out $run/hf
        every flag; the curves in a browser:
          $recursive pretrain --help-all
          ${bin}tensorboard --logdir $run/tensorboard
TEXT
