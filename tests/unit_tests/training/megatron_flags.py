"""Every flag of Megatron's parser: refused, tried, or harmless with a reason. Read by ``test_every_flag``.

A group of the parser stands as a whole where it can. In a mixed group a flag is of a family that another flag switches
on, or is named. Where a reason says that a flag is refused, it is one of :data:`REFUSED`.
"""

from __future__ import annotations

ALL = 808  # a new flag of a family is seen by this alone

# Whole groups of which nothing that is not refused has an effect on a GPT (under rotary positions) | why.
GROUPS: dict[str, str] = {
    "rl": "--perform-rl-step, --rl-profile and --rl-use-sequence-packing are refused",
    "biencoder": "read by Megatron's BERT retrieval scripts",
    "vision": "--vision-pretraining is refused",
    "inference": "read by Megatron's inference engines, which nothing here starts",
    "mla": "--multi-latent-attention is refused; what scales YaRN is as the positions below",
    "experimental_attention_variant": "--experimental-attention-variant is refused",
    "Logits Distillation": "--logits-save-dir and --logits-load-dir are refused",
    "In-process restart": "--inprocess-restart is refused",
    "fault injector": (
        "--fault-injector-ranks and --fault-injector-num-ranks are refused where their package is missing"),
    "one logger": "telemetry of the run's times, from outside of the model",
    "autoresume": "--adlr-autoresume is refused",
    "straggler": "--log-straggler is refused where its package is missing, and times forward_step otherwise",
    "workload inspector": "a server beside the run",
    "ft_package": "--enable-ft-package is refused where its package is missing",
}

# Families of flags, by prefix, that nothing reads unless another flag is given | why.
FAMILIES: dict[str, str] = {
    "--moe- --expert- --use-grouped-gemm-for-shared-expert --overlap-moe --overlap-dispatch --ep-overlap "
    "--high-priority-a2a --save-tokens-per-expert": "--num-experts is refused",
    "--tp-comm- --disable-tp-comm-": "--tp-comm-overlap is refused",
    "--mtp-": "--mtp-num-layers is refused",
    "--dsa- --disable-dsa- --linear-": "--experimental-attention-variant is refused",
    "--mup-": "--use-mup is refused",
    "--fp8- --disable-fp8- --keep-fp8 --reuse-grad-buf-for-mxfp8 --first-last-layers-bf16 --num-layers-at-": (
        "--fp8-format is refused"),
    "--fp4-": "--fp4-format is refused",
    "--mamba- --disable-mamba-": "--hybrid-layer-pattern is refused",
    "--cuda-graph- --inference- --nccl-all-reduce-for-prefill --mlp-chunks-for-prefill --flash-decode": (
        "read by inference engines or CUDA graphs"),
    "--offload-modules --min-offloaded --delay-offload --delta-offload --activation-offload --fine-grained-off "
    "--cpu-offloading-": "--cpu-offloading-num-layers and --fine-grained-activation-offloading are refused",
    "--hierarchical-context --max-seqlen-per-dp --hybrid-context --cp-comm": "--context-parallel-size is refused",
    "--kitchen- --use-kitchen": "of the package kitchen, which is not installed with this one",
    "--muon- --lion-": "of --optimizer muon, which test_optimizer_runs tries; lion is refused",
    "--megatron-fsdp- --fsdp- --torch-fsdp2- --outer-dp --data-parallel-sharding --enable-full-sharding "
    "--suggested-communication --create-all-gather --disable-strict-fsdp": (
        "--use-megatron-fsdp and --use-torch-fsdp2 are refused"),
    "--fim-": "--fim-data is refused",
    "--wgrad-deferral": "--defer-embedding-wgrad-compute is refused",
    "--microbatch-group": "--num-virtual-stages-per-pipeline-rank is refused",
    "--distrib-optim- --dist-ckpt --ckpt- --no-ckpt- --async- --use-persistent-ckpt --non-persistent --replication "
    "--use-dist-ckpt --disable-ckpt --disable-stream-ckpt --auto-detect-ckpt": "how a checkpoint is written and read",
    "--yarn- --no-yarn- --relative-attention- --rotary- --mrope": "positions: the same in every pass",
    "--flight-recorder --disable-flight-recorder": "records collectives",
}  # fmt: skip

# Single flags of mixed groups | why they are harmless.
SINGLE: dict[str, str] = {
    "--help": "prints and ends",
    """--no-initialization --use-cpu-initialization --embedding-init-method-std
    --data-parallel-random-init --te-rng-tracker --disable-jit-fuser --deterministic-mode --batch-invariant-mode
    --disable-bf16-reduced-precision-matmul --enable-experimental""":
        "how a model is made or its kernels chosen, once",
    """--cross-entropy-loss-fusion --cross-entropy-fusion-impl --flash-attention-version --norm-epsilon
    --apply-layernorm-1p --add-qkv-bias --qk-clip-alpha --qk-clip-threshold --attention-output-gate
    --calculate-per-token-loss --apply-query-key-layer-scaling --use-fused-weighted-squared-relu
    --fused-residual-rmsnorm --use-transformer-engine-op-fuser --use-grouped-gemm-for-dense-mlp
    --use-te-activation-func --symmetric-ar-type --mlp-chunks-for-training
    --disable-clone-scatter-output-in-embedding --window-attn-skip-freq --use-rotary-position-embeddings
    --use-rope-scaling --rope-scaling-factor --no-rope-freq --rope-type --no-position-embedding
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --attention-softmax-in-fp32 --fp16-lm-cross-entropy""":
        "what one layer or the loss computes: the same in every pass",
    """--decoder-last-pipeline-num-layers
    --overlap-p2p-communication-warmup-flush
    --no-overlap-p2p-communication --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split --distributed-timeout-minutes --distributed-timeout-seconds-after-init
    --disable-align-grad-reduce --local-rank --nccl-communicator-config-path
    --use-tp-pp-dp-mapping --disable-gloo-process-groups
    --high-priority-stream-groups --disable-symmetric-registration --fake-process-group""":
        "how ranks are laid out and talk; the ring sets its own point-to-point options",
    """--ddp-num-buckets --ddp-bucket-size --ddp-pad-buckets-for-high-nccl-busbw
    --ddp-reduce-scatter-with-fp32-accumulation --ddp-param-name-patterns-for-fp32-local-accumulation
    --ddp-average-in-collective --overlap-param-gather-with-optimizer-step --no-align-param-gather
    --no-use-layer-wise-param-layout --no-gradient-reduce-div-fusion --grad-reduce-in-bf16
    --accumulate-allreduce-grads-in-fp32""":
        "what DDP does with a bucket once it is ready (pipeline/readiness.py)",
    """--initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis --adam-beta1 --adam-eps
    --sgd-momentum --no-weight-decay-cond-type --lr-wsd-decay-style --lr-decay-samples --lr-wsd-decay-samples
    --lr-warmup-samples --lr-warmup-init --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler
    --start-weight-decay --end-weight-decay --weight-decay-incr-style --decoupled-lr --decoupled-min-lr
    --optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload
    --overlap-cpu-optimizer-d2h-h2d --dump-param-to-param-group-map --no-pin-cpu-grads --no-pin-cpu-params
    --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype""":
        "of the optimizer and its schedule, which meet parameters and not passes",
    """--batch-size --model-parallel-size --warmup --use-mcore-models --encoder-num-layers
    --decoder-num-layers --encoder-seq-length --decoder-seq-length --onnx-safe --bert-no-binary-head
    --sample-rate --mask-prob --short-seq-prob""":
        "retired or of other models: Megatron refuses it or reads it nowhere on the way of a GPT",
    """--step-batch-size-schedule --empty-unused-memory-level
    --check-weight-hash-across-dp-replicas-interval --train-sync-interval
    --exit-duration-in-mins --exit-signal --exit-signal-handler-for-dataloader
    --exit-signal-handler-for-training --manual-gc --manual-gc-interval --disable-manual-gc-eval
    --iterations-to-skip --no-check-for-nan-in-loss-and-grad --check-for-large-grads
    --result-rejected-tracker-filename --start-eval-at-iter --skip-train --test-mode --full-validation
    --validation-set-names --error-injection-rate --error-injection-type
    --check-for-spiky-loss""":
        "between steps, or of the number of micro-batches, which the schedule is given",
    """--persistent-save-interval --save-retain-interval
    --load-main-params-from-ckpt --finetune --use-mp-args-from-checkpoint-args
    --disable-use-tokenizer-model-from-checkpoint-args --no-save-optim --no-save-rng --no-load-optim
    --override-ckpt-iteration --disable-msc""":
        "when a checkpoint is written, or what is read of it",
    """--pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra
    --memory-snapshot-path --record-shapes --nvtx-ranges --log-params-norm --log-progress --timing-log-option
    --tensorboard-queue-size --disable-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard
    --log-memory-interval --log-device-memory-used --log-num-zeros-in-grad --no-barrier-with-level-1-timing
    --log-world-size-to-tensorboard --wandb-exp-name --wandb-entity --wandb-save-dir --logging-level""":
        "observes",
    """--no-mmap-bin-files --num-dataset-builder-threads --object-storage-cache-path --mid-level-dataset-surplus
    --allow-ambiguous-pad-tokens --disable-pad-vocab-size --vocab-extra-ids --tokenizer-metadata
    --tokenizer-special-tokens --tiktoken-pattern --tiktoken-num-special-tokens --tokenizer-sentencepiece-legacy
    --disable-tokenizer-sentencepiece-ignore-extra-whitespaces --tokenizer-hf-no-use-fast
    --tokenizer-hf-no-include-special-tokens --trust-remote-code --null-tokenizer-eod-id --chat-template
    --sft-tokenizer-prompt-format""":
        "of the data and its tokens, before the model",
}  # fmt: skip

# Refused, the first flag of a line by a sentence that names it. {folder}: one that can be written.
REFUSED = """
--pipeline-model-parallel-layout Et|tL
--num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 2
--num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-size 2
--init-model-with-meta-device
--num-experts 4
--mtp-num-layers 1
--multi-latent-attention
--context-parallel-size 2
--fp8-format e4m3
--fp8-param-gather
--fp8-output-proj
--fp4-format e2m1
--fp4-param-gather
--te-precision-config-file nowhere
--defer-embedding-wgrad-compute
--delay-wgrad-compute
--use-megatron-fsdp
--use-torch-fsdp2
--use-mup
--tp-comm-overlap
--heterogeneous-layers-config-path nowhere
--heterogeneous-layers-config-encoded-json {}
--hybrid-layer-pattern **
--hybrid-override-pattern **
--mtp-hybrid-override-pattern *
--is-hybrid-model
--experimental-attention-variant dsa
--cuda-graph-impl local
--enable-cuda-graph
--external-cuda-graph
--tensor-parallel-num-weight-shards 2
--save-activations-interval 1
--save-dgrads-interval 1
--fine-grained-activation-offloading
--cpu-offloading-num-layers 1
--perform-rl-step
--sft
--fim-data
--dataloader-inter-document-masking
--logits-save-dir nowhere
--logits-load-dir nowhere
--inprocess-restart
--dataloader-type external
--init-method-xavier-uniform
--pretrained-checkpoint nowhere
--ckpt-format torch
--non-persistent-ckpt-type local
--non-persistent-save-interval 2
--optimizer lion
--wandb-project x
--enable-ft-package
--log-straggler
--distributed-backend nccl
--fp16
--use-flash-attn
--async-save
--window-size 4,0
--softmax-type off-by-one
--qk-clip
--log-max-attention-logit
--qk-l2-norm
--rampup-batch-size 2 2 8
--enable-msc
--yaml-cfg nowhere
--openai-gelu --no-bias-gelu-fusion
--quick-geglu
--squared-relu
--activation-func-clamp-value 1 --swiglu
--apply-residual-connection-post-layernorm
--freeze-all-layers
--decrease-batch-size-if-needed
--inference-rng-tracker
--adlr-autoresume
--vision-pretraining
--rl-profile
--rl-use-sequence-packing
--fault-injector-ranks 0
--fault-injector-num-ranks 1
--lazy-mpu-init
--use-ring-exchange-p2p
--distribute-saved-activations --recompute-passes
--phase-transition-iterations 2
--num-distributed-optimizer-instances 2
--use-precision-aware-optimizer
--fp32-residual-connection --bf16
--log-energy
--gpu-sniff-test-interval 1
--optimizer-cuda-graph
--record-memory-history
--use-nccl-ub
--config-logger-dir nowhere
--checkpoint-activations
--save-params-interval 1
--save-wgrads-interval 1
--multiple-validation-sets
--use-sharp
--sharp-enabled-group dp
--pipeline-model-parallel-comm-backend ucc
"""

# Tried by tests that train, and taken by the parser and its checks: the first flag of a line, with what it needs.
TRIED = """
--tensor-model-parallel-size 2
--pipeline-model-parallel-size 2
--sequence-parallel --tensor-model-parallel-size 2
--bf16
--num-layers 4
--hidden-size 64
--num-attention-heads 2
--attention-backend auto
--num-query-groups 2 --group-query-attention
--group-query-attention --num-query-groups 2
--ffn-hidden-size 48
--kv-channels 16
--hidden-dropout 0.1
--attention-dropout 0.1
--disable-bias-linear
--glu-linear-offset 0.5 --swiglu --no-bias-swiglu-fusion
--normalization RMSNorm
--qk-layernorm
--init-method-std 0.01
--recompute-granularity full --recompute-method uniform --recompute-num-layers 1
--recompute-method block --recompute-granularity full --recompute-num-layers 1
--recompute-num-layers 1 --recompute-granularity full --recompute-method uniform
--recompute-modules core_attn --recompute-granularity selective
--recompute-activations
--transformer-impl local
--max-position-embeddings 32
--position-embedding-type rope
--make-vocab-size-divisible-by 64
--swiglu
--untie-embeddings-and-output-weights
--weight-decay 0.1
--apply-wd-to-qk-layernorm --qk-layernorm
--clip-grad 0.5
--adam-beta2 0.95
--profile --profile-step-start 1 --profile-step-end 2 --save {folder} --save-interval 3
--profile-step-start 1
--profile-step-end 2
--use-pytorch-profiler
--profile-ranks 0
--micro-batch-size 1
--global-batch-size 16
--train-iters 8
--train-samples 48 !--train-iters !--lr-decay-iters !--lr-warmup-iters
--exit-interval 2
--exit-signal-handler
--no-masked-softmax-fusion
--no-bias-gelu-fusion
--no-rope-fusion
--no-persist-layer-norm
--no-gradient-accumulation-fusion
--seed 7
--lr-decay-style cosine
--lr-decay-iters 12
--lr-wsd-decay-iters 3 --lr-decay-style WSD
--lr-warmup-fraction 0.1 !--lr-warmup-iters
--lr-warmup-iters 2
--lr 3e-3
--min-lr 1e-4
--save {folder} --save-interval 3
--load {folder} --save {folder} --save-interval 3
--verify-integrity
--no-load-rng
--loss-scale 8
--decoder-first-pipeline-num-layers 1 --pipeline-model-parallel-size 2 --num-layers 4
--overlap-grad-reduce --use-distributed-optimizer
--overlap-param-gather --overlap-grad-reduce --use-distributed-optimizer
--use-distributed-optimizer
--eval-iters 2
--eval-interval 3
--eval-global-batch-size 16
--eval-micro-batch-size 1
--data-path {data}
--split 80,10,10 --data-path {data}
--train-data-path {data} --valid-data-path {data} --test-data-path {data} !--split
--valid-data-path {data} --train-data-path {data} --test-data-path {data} !--split
--test-data-path {data} --train-data-path {data} --valid-data-path {data} !--split
--data-args-path {blend}
--per-split-data-args-path {blends} !--split
--per-dataset-sequences-path {sequences} --data-path {data}
--dataloader-fast-cache-load --data-path {data} --per-dataset-sequences-path {sequences}
--dataloader-defer-npy-index-mmap --data-path {data} --per-dataset-sequences-path {sequences}
--data-cache-path {folder}
--mock-data
--seq-length 8
--num-workers 1
--reset-position-ids
--reset-attention-mask
--eod-mask-loss
--no-create-attention-mask-in-dataloader
--vocab-size 120
--padded-vocab-size 256
--tokenizer-type NullTokenizer
--null-tokenizer-pad-id 3
--log-interval 2
--log-throughput
--timing-log-level 2
--tensorboard-dir {folder}
--tensorboard-log-interval 2
--log-timers-to-tensorboard
--log-memory-to-tensorboard
--rerun-mode disabled
"""

# Tried by tests with files that are made there: a checkpoint, a tokenizer, a layer spec.
TRIED_ELSEWHERE = """
--use-checkpoint-args --exit-on-missing-checkpoint --vocab-file --merge-file --tokenizer-model --spec
"""

# Values of flags that are no numbers or choices, and of those of which the default or 1 would be wrong.
VALUES = {"--lr-warmup-init": "0", "--sharp-enabled-group": "dp"}

# They end before a step, as they should, train from memory as it is, or evaluate all mock data.
WITHOUT_A_STEP = "--help -h --skip-train --iterations-to-skip --no-initialization --full-validation"
