"""What a checkpoint binds: every value of Megatron's config that makes another function of equal weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.unit_tests.training.runs import metrics_of, refusals, save_to, train

# A field of the config that is made of arguments of other names.
MADE_OF = {
    "activation_func": "swiglu", "gated_linear_unit": "quick_geglu", "bias_activation_fusion": "bias_gelu_fusion",
    "rope_scaling": "use_rope_scaling", "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "seq_length": "max_position_embeddings",
}  # fmt: skip

# Fields that leave the function of the weights as it is, by why; the start of a name stands for all.
HARMLESS: dict[str, tuple[str, ...]] = {
    "where and when it is computed": (
        "tensor_", "gtp_", "pipeline_", "virtual_pipeline", "sequence_parallel", "context_parallel", "hierarchical_",
        "max_seqlen_per", "hybrid_context", "expert_", "num_microbatches_with", "tp_comm", "overlap_", "delay_",
        "ep_overlap", "variable_seq", "batch_p2p", "use_ring_exchange", "deallocate_", "defer_embedding", "wgrad_",
        "microbatch_group", "cpu_offloading", "_cpu_offloading", "barrier_", "num_layers_in_", "account_for_",
        "recompute_", "distribute_saved", "cp_comm", "enable_cuda_graph", "cuda_graph", "external_cuda_graph",
        "disable_parameter", "config_logger", "symmetric_ar", "nccl_all_reduce", "mlp_chunks", "scatter_embedding",
        "fine_grained", "offload_", "min_offloaded", "delta_offload", "activation_offload", "timers",
        "high_priority", "clone_scatter", "hetereogenous_dist", "parallel_output", "test_mode", "log_max_attention",
    ),
    "how it is rounded": (
        "fp16", "bf16", "params_dtype", "autocast", "enable_autocast", "deterministic", "fp32_residual",
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "disable_bf16", "masked_softmax", "persist_",
        "memory_efficient_layer_norm", "bias_dropout_fusion", "apply_rope_fusion", "fused_", "use_fused_weighted",
        "use_transformer_engine_op", "batch_invariant", "use_te_activation", "transformer_impl", "attention_backend",
        "flash_", "gradient_accumulation_fusion", "cross_entropy", "activation_func_fp8",
    ),
    "how it starts or trains": (
        "perform_initialization", "use_cpu_initialization", "init_", "output_layer_init", "embedding_init",
        "hidden_dropout", "attention_dropout", "use_te_rng", "calculate_per_token_loss", "finalize_", "grad_",
        "no_sync", "param_sync", "restore_modelopt", "extra_checkpoint", "pre_wrap", "post_wrap",
        "qk_clip", "use_arbitrary_attention_mask",
    ),
    "inference alone": ("inference_", "use_inference"),
    "a program of the user's": ("transformer_layer_spec", "transformer"),
    "told of the vocabulary": ("vocab_size", "make_vocab", "should_pad"),
    "refused, or follows what is": (
        "mtp_", "moe_", "num_moe", "use_grouped_gemm", "multi_latent", "experimental_attention", "dsa_", "linear_",
        "use_mup", "mup_", "fp8", "fp4", "first_last_layers", "num_layers_at_", "use_kitchen", "kitchen_", "tp_only",
        "mamba_", "use_mamba", "is_hybrid", "heterogeneous_", "quant_recipe",
    ),
    "has no flag": ("softmax_scale",),
    "read by no layer": ("apply_residual_connection_post_layernorm",),
}  # fmt: skip


def unlisted_fields() -> list[str]:
    """Fields that no table has, and what the package's table has beyond Megatron's arguments and ours."""
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_recursive.training.architecture import ARCHITECTURE
    from megatron_recursive.training.norm_arguments import add_norm_arguments

    names = [field.name for config in (TransformerConfig, GPTModelConfig) for field in dataclasses.fields(config)]
    harmless = tuple(start for starts in HARMLESS.values() for start in starts)
    free = [n for n in names if MADE_OF.get(n, n) not in ARCHITECTURE and not n.startswith(harmless)]
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    add_norm_arguments(parser)
    return free + sorted(set(ARCHITECTURE) - {action.dest for action in parser._actions})


def test_every_field_of_the_config_binds_or_is_known_not_to() -> None:
    assert run_distributed(unlisted_fields, 1) == [[]]


OTHERS = {
    "--rotary-base 5000": "--rotary-base 10000 (this run: 5000)",
    "--rotary-percent 0.5": "--rotary-percent 1.0 (this run: 0.5)",
    "--rotary-interleaved": "--rotary-interleaved off (this run: on)",
    "--rotary-seq-len-interpolation-factor 2": "--rotary-seq-len-interpolation-factor None (this run: 2)",
    "--use-rope-scaling": "--use-rope-scaling off (this run: on)",
    "--norm-epsilon 0.1": "--norm-epsilon 1e-05 (this run: 0.1)",
    "--apply-layernorm-1p": "--apply-layernorm-1p off (this run: on)",
    "--no-bias-gelu-fusion": "--no-bias-gelu-fusion off (this run: on)",
    "--squared-relu --no-bias-gelu-fusion": "--squared-relu off (this run: on); give the checkpoint's values",
}  # fmt: skip


@pytest.fixture(scope="module")
def rotary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotary")
    assert train(*save_to(folder, every=1), "--position-embedding-type", "rope", "--train-iters", "1") is None
    return folder


def test_another_function_of_equal_weights_is_refused_by_flag(rotary: Path) -> None:
    common = ["--load", rotary, "--position-embedding-type", "rope", "--train-iters", "1"]
    sentences = refusals([[*common, *flags.split()] for flags in OTHERS])
    for (flags, expected), said in zip(OTHERS.items(), sentences, strict=True):
        assert expected in said, (flags, said)


def test_use_checkpoint_args_takes_them(tmp_path: Path) -> None:
    one = ["--train-iters", "1", "--lr-decay-iters", "9"]
    own = ["--norm-epsilon", "0.1", "--position-embedding-type", "rope", "--rotary-base", "5000", "--swiglu"]
    assert train(*save_to(tmp_path, every=1), *own, *one, "--qk-layernorm") is None
    more = ["--train-iters", "2", "--override-opt_param-scheduler", "--use-checkpoint-args"]
    assert train("--load", tmp_path, *more, "--metrics-file", tmp_path / "metrics.jsonl") is None
    assert sorted(metrics_of(tmp_path)) == [1, 2]


def test_what_has_no_meaning_beside_the_rest_is_not_compared(tmp_path: Path) -> None:
    from megatron_recursive.errors import UserError
    from megatron_recursive.training.architecture import FUNCTION, SHAPES, check_architecture

    def told(saved: dict[str, Any], **mine: Any) -> str:
        run = argparse.Namespace(**{**dict.fromkeys(SHAPES, 1), "group_query_attention": False, **FUNCTION, **mine})
        try:
            check_architecture(tmp_path, saved, run)
        except UserError as error:
            return str(error)
        return ""

    shapes = {**dict.fromkeys(SHAPES, 1), "group_query_attention": False}
    rope = {"position_embedding_type": "rope"}
    assert told({**shapes, "rotary_base": 7, "num_query_groups": 9}) == ""  # learned positions, a key head a query head
    assert told({**shapes, **rope, "rope_scaling_factor": 3.0}, **rope) == ""
    assert "--window-size None (this run: (8, 0))" in told(shapes, window_size=(8, 0))
    assert told({**shapes, "window_size": [8, 0]}, window_size=(8, 0)) == ""
    assert "--disable-bias-linear on (this run: off)" in told({**shapes, "add_bias_linear": False})
    assert "--norm-epsilon 0.1 (this run: 1e-05)" in told({**shapes, "layernorm_epsilon": 0.1})


@pytest.mark.parametrize("fused", [True, False])
def test_an_import_of_what_was_exported_goes_on_under_its_flags(rotary: Path, fused: bool) -> None:
    """The default's fused GELU is the one by tanh; beside linear biases Megatron turns those of q, k and v on."""
    from megatron_recursive.hf.convert.architecture import Architecture
    from megatron_recursive.training.architecture import check_architecture
    from megatron_recursive.training.checkpointing import saved_arguments

    trained = {**saved_arguments(rotary / "iter_0000001"), "bias_gelu_fusion": fused}
    assert trained["add_qkv_bias"] and trained["add_bias_linear"]
    arch = Architecture.from_megatron(trained, "it")
    assert arch.activation == ("gelu_pytorch_tanh" if fused else "gelu")
    assert ("--no-bias-gelu-fusion" in arch.megatron_flags()) is not fused
    check_architecture(rotary, arch.to_megatron(), argparse.Namespace(**trained))
    assert arch.to_megatron()["bias_gelu_fusion"] is fused  # which --use-checkpoint-args takes


def test_an_earlier_import_of_gelu_by_tanh_is_the_fused_one() -> None:
    from megatron_recursive.models.stored_arguments import DONOR, name_as_today

    told = {"openai_gelu": True, "bias_gelu_fusion": False, "add_bias_linear": True}
    imported, trained = argparse.Namespace(**told, **{DONOR: "gpt2"}), argparse.Namespace(**told)
    for args in (imported, trained):
        name_as_today(args)
    assert imported.bias_gelu_fusion and not trained.bias_gelu_fusion
