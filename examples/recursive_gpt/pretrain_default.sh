#!/usr/bin/env bash
# The main job on an embedded default: real English text, a tokenizer, a recursive GPT that trains, stops, resumes,
# evaluates and draws its curves. Minutes on two CPU cores; one rank per GPU where there are GPUs.
#
#   make pretrain                      everything, into runs/default
#   make pretrain ARGS="--lr 1e-3"     further flags go to pretrain_recursive_gpt.py
#   RUN=runs/other make pretrain       into another folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run=${RUN:-runs/default}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
stages=$((ranks % 2 == 0 ? 2 : 1)) # an even number of ranks: two pipeline stages, and data parallelism over the pairs

say() { printf '\n== %s\n' "$*"; }
step() { printf '\n$ %s\n' "$*"; "$@"; }

say "1/5 a corpus of English from what CPython ships, a tokenizer, and token files (kept: rm -r $run makes them anew)"
[ -e "$run/data/valid.jsonl" ] || step python tools/build_corpus.py --output "$run/data"
[ -e "$run/tokenizer/tokenizer.json" ] ||
  step python tools/train_tokenizer.py --input "$run/data/train.jsonl" --output "$run/tokenizer" --vocab-size 4096
for split in train valid; do
  [ -e "$run/data/$split.idx" ] ||
    step python tools/preprocess_data.py --input "$run/data/$split.jsonl" --output "$run/data/$split" \
      --tokenizer "$run/tokenizer" --workers 2
done

train=(
  torchrun --standalone --nproc_per_node "$ranks" examples/recursive_gpt/pretrain_recursive_gpt.py
  --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --swiglu --disable-bias-linear
  --normalization RMSNorm --position-embedding-type rope --seq-length 128 --max-position-embeddings 128
  --hidden-dropout 0 --attention-dropout 0
  --num-refinement-blocks 3 --num-latent-refinements 2
  --train-data-path "$run/data/train" --valid-data-path "$run/data/valid" --test-data-path "$run/data/valid"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer" --num-workers 0
  --pipeline-model-parallel-size "$stages"
  --micro-batch-size $((4 / stages)) --global-batch-size $((4 * ranks)) --train-iters 300
  --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 20 --clip-grad 1.0
  --weight-decay 0.1 --adam-beta2 0.95
  --log-interval 10 --eval-interval 100 --eval-iters 8
  --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 100 --ckpt-format torch_dist
  --tensorboard-dir "$run/tensorboard" --tensorboard-log-interval 10 "$@"
)
if [ -e "$run/checkpoints" ]; then
  say "2/5 $run/checkpoints exists: the training below goes on from its last checkpoint"
else
  say "2/5 training, up to the stop at iteration 200"
  step "${train[@]}" --exit-interval 200
fi
say "3/5 the same command again: it resumes from the checkpoint and goes on to the end"
step "${train[@]}"
say "4/5 the curves"
step python tools/plot_metrics.py --metrics "$run/checkpoints/metrics.jsonl" --output "$run/loss_curve.png"
say "5/5 summary"
step python tools/summarize_run.py --metrics "$run/checkpoints/metrics.jsonl"
cat <<TEXT

steps:  each is a command of its own, printed above after a $: tools/build_corpus.py, tools/train_tokenizer.py,
        tools/preprocess_data.py, examples/recursive_gpt/pretrain_recursive_gpt.py (twice: train, resume),
        tools/plot_metrics.py, tools/summarize_run.py
files:  checkpoints and metrics.jsonl in $run/checkpoints, curves in $run/loss_curve.png,
        TensorBoard events in $run/tensorboard, corpus and tokens in $run/data, tokenizer in $run/tokenizer
next:   tensorboard --logdir $run/tensorboard
        RUN=runs/plain make pretrain ARGS=--disable-recursive-refinement         # the ablation
        RUN=runs/deep make pretrain ARGS="--num-refinement-blocks 4 --no-detach-between-refinements"
        python examples/recursive_gpt/pretrain_recursive_gpt.py --help          # every flag
TEXT
