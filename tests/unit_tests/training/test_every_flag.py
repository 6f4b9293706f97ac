"""Every flag of Megatron's parser is tried by a test, refused, or said to be harmless here: a new one is seen."""

from __future__ import annotations

import re
from pathlib import Path

from tests.distributed import REPOSITORY, run_distributed

FLAG = re.compile(r"--[a-z0-9][a-z0-9_-]*")
ALL = 808  # a new flag of a family below is seen by this alone

# Whole groups and families (prefixes) of flags that nothing reads unless another flag is given | why.
INERT: dict[str, str] = {
    "group:rl": "--perform-rl-step is refused",
    "group:biencoder": "read by Megatron's BERT retrieval scripts",
    "group:vision": "read by Megatron's vision scripts",
    "group:inference": "read by Megatron's inference engines, which nothing here starts",
    "group:mla": "--multi-latent-attention is refused",
    "group:experimental_attention_variant": "--experimental-attention-variant is refused",
    "group:Logits Distillation": "--logits-save-dir and --logits-load-dir are refused",
    "group:In-process restart": "--inprocess-restart is refused",
    "group:fault injector": "breaks a run on purpose, whatever the model",
    "group:one logger": "telemetry of the run's times, from outside of the model",
    "group:autoresume": "asks NVIDIA's cluster whether to stop, between steps",
    "group:straggler": "of --log-straggler, which times forward_step",
    "group:workload inspector": "a server beside the run",
    "group:ft_package": "of --enable-ft-package",
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
    "--cpu-offloading-": "offloading is refused",
    "--hierarchical-context --max-seqlen-per-dp --hybrid-context --cp-comm": "--context-parallel-size is refused",
    "--kitchen- --use-kitchen": "the package kitchen is not installed with this one, and its recipes are refused",
    "--muon- --lion-": "their optimizers need a package, and are refused without",
    "--megatron-fsdp- --fsdp- --torch-fsdp2- --outer-dp --data-parallel-sharding --enable-full-sharding "
    "--suggested-communication --create-all-gather --disable-strict-fsdp": "FSDP is refused",
    "--fim-": "--fim-data is refused",
    "--wgrad-deferral": "--defer-embedding-wgrad-compute is refused",
    "--microbatch-group": "virtual stages are refused",
    "--distrib-optim- --dist-ckpt --ckpt- --no-ckpt- --async- --use-persistent-ckpt --non-persistent --replication "
    "--use-dist-ckpt --disable-ckpt --disable-stream-ckpt --auto-detect-ckpt": "how a checkpoint is written and read",
    "--yarn- --no-yarn- --relative-attention- --rotary- --mrope": "positions: the same in every pass",
    "--flight-recorder --disable-flight-recorder": "records collectives",
}  # fmt: skip

# Single flags of mixed groups | why they are harmless.
SINGLE: dict[str, str] = {
    """--no-initialization --use-cpu-initialization --embedding-init-method-std --init-model-with-meta-device
    --data-parallel-random-init --te-rng-tracker --disable-jit-fuser --deterministic-mode --batch-invariant-mode
    --disable-bf16-reduced-precision-matmul --enable-experimental""":
        "how a model is made or its kernels chosen, once",
    """--cross-entropy-loss-fusion --cross-entropy-fusion-impl --flash-attention-version --fp32-residual-connection
    --apply-residual-connection-post-layernorm --norm-epsilon --apply-layernorm-1p --add-qkv-bias
    --activation-func-clamp-value --qk-clip-alpha --qk-clip-threshold --attention-output-gate
    --calculate-per-token-loss --apply-query-key-layer-scaling --use-fused-weighted-squared-relu
    --fused-residual-rmsnorm --use-transformer-engine-op-fuser --use-grouped-gemm-for-dense-mlp
    --use-te-activation-func --symmetric-ar-type --mlp-chunks-for-training --distribute-saved-activations
    --disable-clone-scatter-output-in-embedding --window-attn-skip-freq --use-rotary-position-embeddings
    --use-rope-scaling --rope-scaling-factor --no-rope-freq --rope-type --no-position-embedding --openai-gelu
    --squared-relu --quick-geglu --no-bias-swiglu-fusion --no-bias-dropout-fusion --attention-softmax-in-fp32
    --fp16-lm-cross-entropy""":
        "what one layer or the loss computes: the same in every pass",
    """--pipeline-model-parallel-comm-backend --use-ring-exchange-p2p --overlap-p2p-communication-warmup-flush
    --no-overlap-p2p-communication --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split --distributed-timeout-minutes --distributed-timeout-seconds-after-init
    --disable-align-grad-reduce --local-rank --lazy-mpu-init --nccl-communicator-config-path
    --use-tp-pp-dp-mapping --disable-gloo-process-groups --use-sharp --sharp-enabled-group
    --high-priority-stream-groups --use-nccl-ub --disable-symmetric-registration --fake-process-group""":
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
    --freeze-all-layers --optimizer-cpu-offload --optimizer-cuda-graph --optimizer-offload-fraction
    --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d --dump-param-to-param-group-map
    --no-pin-cpu-grads --no-pin-cpu-params --use-precision-aware-optimizer --main-grads-dtype
    --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype""":
        "of the optimizer and its schedule, which meet parameters and not passes",
    """--batch-size --model-parallel-size --warmup --checkpoint-activations --use-mcore-models --encoder-num-layers
    --decoder-num-layers --encoder-seq-length --decoder-seq-length --onnx-safe --bert-no-binary-head
    --sample-rate --mask-prob --short-seq-prob""":
        "retired or of other models: Megatron refuses it or reads it nowhere on the way of a GPT",
    """--rampup-batch-size --step-batch-size-schedule --decrease-batch-size-if-needed --empty-unused-memory-level
    --check-weight-hash-across-dp-replicas-interval --gpu-sniff-test-interval --train-sync-interval
    --exit-duration-in-mins --exit-signal --exit-signal-handler-for-dataloader
    --exit-signal-handler-for-training --manual-gc --manual-gc-interval --disable-manual-gc-eval
    --iterations-to-skip --no-check-for-nan-in-loss-and-grad --check-for-large-grads
    --result-rejected-tracker-filename --start-eval-at-iter --skip-train --test-mode --full-validation
    --multiple-validation-sets --validation-set-names --error-injection-rate --error-injection-type
    --check-for-spiky-loss --phase-transition-iterations""":
        "between steps, or of the number of micro-batches, which the schedule is given",
    """--persistent-save-interval --save-params-interval --save-wgrads-interval --save-retain-interval
    --load-main-params-from-ckpt --finetune --use-mp-args-from-checkpoint-args
    --disable-use-tokenizer-model-from-checkpoint-args --no-save-optim --no-save-rng --no-load-optim
    --override-ckpt-iteration --disable-msc""":
        "when a checkpoint is written, or what is read of it",
    """--pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra
    --record-memory-history --memory-snapshot-path --record-shapes --nvtx-ranges --log-params-norm
    --log-progress --timing-log-option --tensorboard-queue-size --disable-log-loss-scale-to-tensorboard
    --log-validation-ppl-to-tensorboard --log-memory-interval --log-device-memory-used --log-num-zeros-in-grad
    --no-barrier-with-level-1-timing --log-world-size-to-tensorboard --wandb-exp-name --wandb-entity
    --logging-level --log-energy""":
        "observes",
    """--no-mmap-bin-files --num-dataset-builder-threads --object-storage-cache-path --mid-level-dataset-surplus
    --allow-ambiguous-pad-tokens --disable-pad-vocab-size --vocab-extra-ids --tokenizer-metadata
    --tokenizer-special-tokens --tiktoken-pattern --tiktoken-num-special-tokens --tokenizer-sentencepiece-legacy
    --disable-tokenizer-sentencepiece-ignore-extra-whitespaces --tokenizer-hf-no-use-fast
    --tokenizer-hf-no-include-special-tokens --trust-remote-code --null-tokenizer-eod-id --chat-template
    --sft-tokenizer-prompt-format""":
        "of the data and its tokens, before the model",
}  # fmt: skip


def groups_of_the_parser() -> list[tuple[str, list[list[str]]]]:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return [(str(group.title), [action.option_strings for action in group._group_actions if action.option_strings])
            for group in parser._action_groups]  # fmt: skip


def words_in(files: list[Path]) -> set[str]:
    return {word for file in files for word in FLAG.findall(file.read_text(encoding="utf-8"))}


def test_no_flag_of_megatron_is_new() -> None:
    (groups,) = run_distributed(groups_of_the_parser, 1)
    tests = [file for file in (REPOSITORY / "tests").rglob("*.py") if file != Path(__file__).resolve()]
    tried = words_in(tests + list((REPOSITORY / "examples").rglob("*.sh")))
    refused = words_in([REPOSITORY / "megatron_recursive" / "training" / "refusals.py"])
    single = {flag for flags in SINGLE for flag in flags.split()}
    families = tuple(prefix for prefixes in INERT if not prefixes.startswith("group:") for prefix in prefixes.split())
    actions = [(title, names) for title, flags in groups for names in flags]
    unseen = [(title, names[0]) for title, names in actions
              if f"group:{title}" not in INERT and not {*names} & (tried | refused | single)
              and not any(name.startswith(families) for name in names)]  # fmt: skip
    assert not unseen, "try them in a test, refuse them, or say why they are harmless"
    assert len(actions) == ALL
    known = {name for _, names in actions for name in names}
    titles = {f"group:{title}" for title, _ in groups}
    assert not single - known and not {key for key in INERT if key.startswith("group:")} - titles, "flags that are gone"
