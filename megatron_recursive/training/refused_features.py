"""The features that this package, or this machine, refuses, in one sentence each: tables, and who reads them."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

from megatron_recursive.errors import UserError

Test = Callable[[argparse.Namespace], Any]

# What is refused | when | what to do instead. Read by the argument check, in this order.
NOT_COVERED: tuple[tuple[str, Test, str], ...] = (
    ("virtual pipeline stages (--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank, "
     "--pipeline-model-parallel-layout)",
     lambda a: a.num_layers_per_virtual_pipeline_stage or a.num_virtual_stages_per_pipeline_rank
     or a.pipeline_model_parallel_layout,
     "leave them out, since the passes of the recursion take their place in the schedule"),
    ("mixture of experts (--num-experts)", lambda a: a.num_experts, "use dense layers"),
    ("multi-token prediction (--mtp-num-layers)", lambda a: a.mtp_num_layers, "leave it out"),
    ("multi-latent attention (--multi-latent-attention)", lambda a: a.multi_latent_attention,
     "use --group-query-attention"),
    ("context parallelism (--context-parallel-size > 1, --hierarchical-context-parallel-sizes)",
     lambda a: a.context_parallel_size > 1 or a.hierarchical_context_parallel_sizes,
     "use --sequence-parallel with tensor parallelism"),
    ("adapters beside an 8-bit frozen base (--lora-rank with --fp8-format, --fp8-param-gather or --fp4-param-gather)",
     lambda a: a.lora_rank and (a.fp8 or a.fp8_param_gather or a.fp4_param_gather), "freeze it in bf16, with --bf16"),
    ("FP8 (--fp8-format)", lambda a: a.fp8, "use --bf16"),
    ("FP4 (--fp4-format)", lambda a: a.fp4, "use --bf16"),
    ("8-bit parameters or a quantised output layer (--fp8-param-gather, --fp4-param-gather, --fp8-output-proj)",
     lambda a: a.fp8_param_gather or a.fp4_param_gather or a.fp8_output_proj, "use --bf16"),
    ("quantisation by a recipe (--te-precision-config-file, --kitchen-config-file, --kitchen-recipe-number)",
     lambda a: a.te_precision_config_file or getattr(a, "kitchen_config_file", None)
     or getattr(a, "kitchen_recipe_number", None) is not None, "use --bf16"),
    # The output layer's inputs are kept for a backward at the step's end that Megatron counts by micro-batches.
    ("deferred weight gradients (--defer-embedding-wgrad-compute, --delay-wgrad-compute)",
     lambda a: a.defer_embedding_wgrad_compute or a.delay_wgrad_compute, "leave it out"),
    ("FSDP (--use-megatron-fsdp, --use-torch-fsdp2)", lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
     "use --use-distributed-optimizer"),
    ("muP (--use-mup)", lambda a: a.use_mup, "leave it out"),
    ("TP communication overlap (--tp-comm-overlap)", lambda a: a.tp_comm_overlap, "leave it out"),
    ("heterogeneous layers (--heterogeneous-layers-config-path, --heterogeneous-layers-config-encoded-json)",
     lambda a: a.heterogeneous_layers_config_path or a.heterogeneous_layers_config_encoded_json,
     "use layers of one shape"),
    ("hybrid layers (--hybrid-layer-pattern, --hybrid-override-pattern, --mtp-hybrid-override-pattern, "
     "--is-hybrid-model)", lambda a: a.hybrid_layer_pattern or a.hybrid_override_pattern
     or a.mtp_hybrid_override_pattern or a.is_hybrid_model, "use attention layers"),
    ("attention variants (--experimental-attention-variant)", lambda a: a.experimental_attention_variant,
     "use softmax attention"),
    ("CUDA graphs (--cuda-graph-impl, --enable-cuda-graph, --external-cuda-graph)",
     lambda a: a.cuda_graph_impl != "none" or a.enable_cuda_graph or a.external_cuda_graph, "leave them off"),
    ("weights in shards (--tensor-parallel-num-weight-shards)",
     lambda a: (a.tensor_parallel_num_weight_shards or 1) > 1, "use --use-distributed-optimizer"),
    # Of a layer's forwards in a step they keep the last, by its name.
    ("files of activations (--save-activations-interval, --save-dgrads-interval)",
     lambda a: a.save_activations_interval or a.save_dgrads_interval, "leave it out"),
    # Both count the layers of one forward pass, and a pass has them all again.
    ("activation offloading (--fine-grained-activation-offloading, --cpu-offloading-num-layers)",
     lambda a: a.fine_grained_activation_offloading or a.cpu_offloading_num_layers, "use --recompute-granularity"),
    # Megatron 0.19.2 has its iterations on the first tensor-parallel rank alone, and reads batches of one sample, for
    # which its schedule's messages are too large.
    ("--full-validation over tensor- or pipeline-parallel ranks", lambda a: a.full_validation
     and max(a.tensor_model_parallel_size, a.pipeline_model_parallel_size) > 1, "use --eval-iters"),
    # They are for Megatron's FSDP: norms would start as memory is, and tied embeddings apart.
    ("models on the meta device (--init-model-with-meta-device)", lambda a: a.init_model_with_meta_device,
     "leave it out"),
    ("reinforcement learning (--perform-rl-step, --rl-profile, --rl-use-sequence-packing)",
     lambda a: a.perform_rl_step or a.rl_profile or a.rl_use_sequence_packing, "leave it out"),
    ("vision models (--vision-pretraining)", lambda a: a.vision_pretraining, "leave it out"),
    # Its random states are never forked: ranks of a tensor-parallel group start with equal shards.
    ("the random numbers of inference (--inference-rng-tracker)", lambda a: a.inference_rng_tracker, "leave it out"),
    # They train as Transformer Engine's, but evaluate in kernels of Megatron's inference engines.
    ("layers of inference (--transformer-impl inference_optimized)",
     lambda a: a.transformer_impl == "inference_optimized", "use --transformer-impl transformer_engine or local"),
    ("--attention-backend local", lambda a: a.attention_backend.name == "local", "use --transformer-impl local"),
    ("process groups of another program (--lazy-mpu-init)", lambda a: a.lazy_mpu_init, "leave it out"),
    ("a ring exchange of its own (--use-ring-exchange-p2p)", lambda a: a.use_ring_exchange_p2p,
     "leave it out, since it is of a torch that was built for it"),
    # Megatron ends without a word of failure, or copies process groups, which cannot be.
    ("--checkpoint-activations", lambda a: a.checkpoint_activations, "use --recompute-granularity"),
    ("files of configs (--config-logger-dir)", lambda a: a.config_logger_dir, "use run.json, which --save writes"),
    ("autoresume of NVIDIA's clusters (--adlr-autoresume)", lambda a: a.adlr_autoresume,
     "use --exit-duration-in-mins or --exit-signal-handler"),
    # Stages would exchange fp32 where Transformer Engine's norms answer in bf16; local layers fail at the first norm.
    ("residuals in fp32 (--fp32-residual-connection)", lambda a: a.fp32_residual_connection,
     "leave it out, or train in fp32"),
    # It leaves a shard in the place of a layer's input, which a replayed pass reads again.
    ("--distribute-saved-activations beside --recompute-passes",
     lambda a: a.distribute_saved_activations and a.recompute_passes, "leave out either"),
    ("Megatron's fine-tuning (--sft)", lambda a: a.sft,
     "use --chat-data PREFIX, whose evaluations average tokens and not micro-batches"),
    ("fill-in-the-middle data (--fim-data)", lambda a: a.fim_data, "leave it out"),
    ("packed documents (--dataloader-inter-document-masking)", lambda a: a.dataloader_inter_document_masking,
     "use --reset-attention-mask and --reset-position-ids"),
    # They hook the output layer, which runs once a block, and the loss knows nothing of what they load.
    ("files of logits (--logits-save-dir, --logits-load-dir)", lambda a: a.logits_save_dir or a.logits_load_dir,
     "use --distill-prepare and --distill-from"),
    ("in-process restarts (--inprocess-restart)", lambda a: a.inprocess_restart, "let torchrun restart the run"),
    ("data loaders of one's own (--dataloader-type external)", lambda a: a.dataloader_type == "external"
     and a.data_stream is None, "use --data-stream, or --dataloader-type single or cyclic"),
    # Nor does Megatron 0.19.2: it passes its config a name that the config does not have.
    ("Xavier initialisation (--init-method-xavier-uniform)", lambda a: a.init_method_xavier_uniform,
     "use --init-method-std"),
    ("--pretrained-checkpoint", lambda a: a.pretrained_checkpoint, "use --init-from-gpt"),
    ("checkpoints other than torch_dist (--ckpt-format)", lambda a: a.ckpt_format != "torch_dist",
     "use --ckpt-format torch_dist"),
    ("checkpoints of a node's own (--non-persistent-ckpt-type local)", lambda a: a.non_persistent_ckpt_type == "local",
     "use --non-persistent-ckpt-type global"),
    ("--non-persistent-save-interval alone",
     lambda a: a.non_persistent_save_interval and a.non_persistent_ckpt_type is None,
     "add --non-persistent-ckpt-type global"),
)  # fmt: skip

# What needs a package that is no part of an installation | when | the package: its module, its name to pip.
NEEDS_PACKAGE: tuple[tuple[str, Test, str, str], ...] = (
    ("--optimizer {0.optimizer}", lambda a: a.optimizer not in ("adam", "sgd"), "emerging_optimizers",
     "emerging-optimizers"),
    ("--wandb-project", lambda a: a.wandb_project, "wandb", "wandb"),
    ("--enable-ft-package", lambda a: a.enable_ft_package, "nvidia_resiliency_ext", "nvidia-resiliency-ext"),
    ("--log-straggler", lambda a: a.log_straggler, "pynvml", "nvidia-ml-py"),
    ("--log-energy", lambda a: a.log_energy, "pynvml", "nvidia-ml-py"),
    ("--num-distributed-optimizer-instances {0.num_distributed_optimizer_instances}",
     lambda a: a.num_distributed_optimizer_instances > 1, "einops", "einops"),
    ("fault injection (--fault-injector-ranks, --fault-injector-num-ranks)",
     lambda a: a.fault_injector_ranks is not None or a.fault_injector_num_ranks is not None, "nvidia_resiliency_ext",
     "nvidia-resiliency-ext"),
    ("--use-precision-aware-optimizer", lambda a: a.use_precision_aware_optimizer, "transformer_engine",
     "transformer-engine[pytorch]"),
)

# What Megatron 0.19.2 reads nowhere on the way of a GPT | when | what to do instead.
NO_EFFECT: tuple[tuple[str, Test, str], ...] = (
    ("--apply-residual-connection-post-layernorm", lambda a: a.apply_residual_connection_post_layernorm,
     "leave it out"),
    # The function that freezes is not called by Megatron's builders, so that everything would be trained.
    ("--freeze-all-layers", lambda a: a.freeze_all_layers, "use --train-only heads or --lora-rank"),
    ("--decrease-batch-size-if-needed", lambda a: a.decrease_batch_size_if_needed,
     "give a --global-batch-size that --micro-batch-size times the data-parallel size divides"),
)  # fmt: skip

# What Megatron 0.19.2 computes otherwise than asked, or not at all, by the arguments of the run or of its checkpoint |
# the sentence. A fused activation adds the bias in its kernel; without biases gelu is never fused.
ACTIVATIONS: tuple[tuple[Test, str], ...] = (
    (lambda a: a.quick_geglu and _fused(a), "--quick-geglu has no fused kernel; add --no-bias-gelu-fusion."),
    (lambda a: a.squared_relu and _fused(a), "--squared-relu has no fused kernel; add --no-bias-gelu-fusion."),
    # No layer reads the flag: what it promises is the fused gelu.
    (lambda a: a.openai_gelu and (a.swiglu or a.squared_relu or a.quick_geglu),
     "--openai-gelu has no effect beside --swiglu, --squared-relu or --quick-geglu; leave it out."),
    (lambda a: a.openai_gelu and not _fused(a),
     "--openai-gelu has no effect in Megatron 0.19, whose approximation by tanh is the fused gelu; leave out "
     "--no-bias-gelu-fusion and --disable-bias-linear, or, for the exact gelu, --openai-gelu."),
    (lambda a: a.activation_func_clamp_value is not None and not (a.swiglu or a.quick_geglu),
     "--activation-func-clamp-value has no effect without --swiglu or --quick-geglu; leave it out."),
    (lambda a: a.activation_func_clamp_value is not None and a.swiglu and a.bias_swiglu_fusion,
     "--activation-func-clamp-value has no effect in the fused --swiglu; add --no-bias-swiglu-fusion."),
    (lambda a: a.position_embedding_type in ("mrope", "relative"),
     "--position-embedding-type must be learned_absolute, rope, yarn or none in a GPT."),
)  # fmt: skip


def _fused(args: argparse.Namespace) -> bool:
    return bool(args.bias_gelu_fusion and args.add_bias_linear)


NOT_ON_CPU: tuple[tuple[str, Test, str], ...] = (
    ("--distributed-backend nccl", lambda a: a.distributed_backend == "nccl", "use --distributed-backend gloo"),
    ("--transformer-impl transformer_engine", lambda a: a.transformer_impl != "local", "use --transformer-impl local"),
    ("--fp16", lambda a: a.fp16, "use --bf16 or fp32"),
    ("--use-flash-attn", lambda a: getattr(a, "use_flash_attn", False), "use the default attention"),
    ("--attention-backend flash or fused", lambda a: a.attention_backend.name in ("flash", "fused"),
     "use --attention-backend auto"),
    ("--async-save", lambda a: a.async_save, "use synchronous checkpoints"),
    ("--log-straggler", lambda a: a.log_straggler, "use --timing-log-level 2"),
    ("--log-energy", lambda a: a.log_energy, "leave it out"),
    ("--gpu-sniff-test-interval", lambda a: a.gpu_sniff_test_interval is not None, "leave it out"),
    ("--record-memory-history", lambda a: a.record_memory_history, "use --log-memory-to-tensorboard"),
    ("--optimizer-cuda-graph", lambda a: a.optimizer_cuda_graph, "leave it out"),
    ("--use-nccl-ub", lambda a: a.nccl_ub, "leave it out"),
    ("--use-sharp or --sharp-enabled-group", lambda a: a.use_sharp or a.sharp_enabled_group, "leave it out"),
    ("--pipeline-model-parallel-comm-backend", lambda a: a.pipeline_model_parallel_comm_backend, "leave it out"),
)  # fmt: skip

NOT_IN_LOCAL_SPEC: tuple[tuple[str, Test, str], ...] = (
    ("sliding-window attention (--window-size)", lambda a: a.window_size is not None, "leave it out"),
    ("--softmax-type other than vanilla", lambda a: a.softmax_type != "vanilla", "--softmax-type vanilla"),
    ("--qk-clip or --log-max-attention-logit", lambda a: a.qk_clip or a.log_max_attention_logit, "leave it out"),
    ("--qk-l2-norm", lambda a: getattr(a, "qk_l2_norm", False), "--qk-layernorm"),
    ("--recompute-modules layernorm",
     lambda a: a.recompute_granularity == "selective" and "layernorm" in (a.recompute_modules or ()),
     "--recompute-modules core_attn"),
    # Megatron's checkpoint function hands the bias through as an output, and its backward then calls itself for ever.
    ("--recompute-modules mlp with biases",
     lambda a: a.recompute_granularity == "selective" and "mlp" in (a.recompute_modules or ()) and a.add_bias_linear,
     "--disable-bias-linear"),
)


def refuse_activations(args: argparse.Namespace) -> None:
    """Raise where the arguments, a checkpoint's among them, ask for what Megatron does not compute."""
    for asked, sentence in ACTIVATIONS:
        if asked(args):
            raise UserError(sentence)


def refuse_features(args: argparse.Namespace, *, on_cpu: bool) -> None:
    """Raise for the first flag that asks for something this package (or this machine) cannot do."""
    for what, asked, instead in NOT_COVERED:
        if asked(args):
            raise UserError(f"Recursive models do not support {what} yet; {instead}.")
    for what, asked, instead in NO_EFFECT:
        if asked(args):
            raise UserError(f"{what} has no effect in Megatron 0.19; {instead}.")
    for what, asked, module, package in NEEDS_PACKAGE:
        if asked(args) and importlib.util.find_spec(module) is None:
            raise UserError(
                f"{what.format(args)} needs the package {package}; install it (pip install {package}), or leave it out."
            )
    if args.wandb_project and not (args.save or args.wandb_save_dir):
        raise UserError("--wandb-project needs --save or --wandb-save-dir, a folder for its files.")
    for what, asked, instead in NOT_ON_CPU if on_cpu else ():
        if asked(args):
            raise UserError(f"{what} needs a CUDA device; on this machine {instead}.")
    for what, asked, instead in NOT_IN_LOCAL_SPEC if args.transformer_impl == "local" else ():
        if asked(args):
            raise UserError(f"{what} needs --transformer-impl transformer_engine; otherwise {instead}.")
