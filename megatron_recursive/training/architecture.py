"""Megatron's arguments that a checkpoint binds, since they make other weights or another function of equal ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of

SHAPES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
    "num_query_groups", "kv_channels", "max_position_embeddings",
)  # fmt: skip

# Another function of equal weights, or a weight more: the value of a checkpoint that stores none.
FUNCTION: dict[str, Any] = {
    "swiglu": False, "squared_relu": False, "quick_geglu": False, "bias_gelu_fusion": True,
    "glu_linear_offset": 0.0, "activation_func_clamp_value": None, "add_bias_linear": True, "add_qkv_bias": False,
    "normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "layernorm_zero_centered_gamma": False,
    "norm_placement": "pre", "output_norm_scope": "branch", "qk_layernorm": False, "qk_norm_scope": "head",
    "norm_weights": "learned", "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla", "window_size": None, "window_attn_skip_freq": None,
    "position_embedding_type": "learned_absolute", "add_position_embedding": True, "rotary_base": 10000,
    "rotary_percent": 1.0, "rotary_interleaved": False, "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None, "mrope_section": None, "use_rope_scaling": False, "rope_scaling_factor": 8.0,
    "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "yarn_original_max_position_embeddings": None,
    "yarn_beta_fast": None, "yarn_beta_slow": None, "yarn_correction_range_round_to_int": True,
    "untie_embeddings_and_output_weights": False,
}  # fmt: skip

ARCHITECTURE = (*SHAPES, *FUNCTION)

Arguments = Mapping[str, Any]


def _is_rotary(args: Arguments) -> bool:
    return args.get("position_embedding_type") in ("rope", "yarn", "mrope")


def _is_yarn(args: Arguments) -> bool:
    return args.get("position_embedding_type") == "yarn"


def _is_plain_gelu(args: Arguments) -> bool:
    """Megatron's fused gelu is the approximation by tanh, its unfused one is exact."""
    return not any(args.get(name) for name in ("swiglu", "squared_relu", "quick_geglu"))


# What an argument needs to be of any meaning; without it Megatron puts different figures there, or reads none.
COUNTS_WHERE: dict[str, Callable[[Arguments], Any]] = {
    "num_query_groups": lambda args: args.get("group_query_attention"),
    "max_position_embeddings": lambda args: args.get("position_embedding_type") == "learned_absolute",
    "bias_gelu_fusion": lambda args: _is_plain_gelu(args) and args.get("add_bias_linear", True),
    "add_qkv_bias": lambda args: not args.get("add_bias_linear", True),  # Megatron turns it on beside those
    "glu_linear_offset": lambda args: args.get("swiglu") or args.get("quick_geglu"),
    "window_attn_skip_freq": lambda args: args.get("window_size"),
    "mrope_section": lambda args: args.get("position_embedding_type") == "mrope",
    "rope_scaling_factor": lambda args: _is_rotary(args) and args.get("use_rope_scaling"),
    **dict.fromkeys(("rotary_base", "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor",
                     "no_rope_freq", "use_rope_scaling"), _is_rotary),
    **dict.fromkeys((name for name in FUNCTION if name.startswith(("yarn_", "mscale", "rotary_scaling"))), _is_yarn),
}  # fmt: skip

# Where the flag is not the argument's name, or says the opposite.
FLAGS = {"layernorm_epsilon": "--norm-epsilon", "layernorm_zero_centered_gamma": "--apply-layernorm-1p"}
OPPOSITES = {"add_bias_linear": "--disable-bias-linear", "add_position_embedding": "--no-position-embedding",
             "bias_gelu_fusion": "--no-bias-gelu-fusion",
             "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int"}  # fmt: skip


def check_architecture(folder: Path, saved: Arguments, run: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model by the flags that differ, before Megatron compares tensor by tensor."""
    theirs = {**FUNCTION, **saved}
    mine = {name: getattr(run, name, default) for name, default in {**dict.fromkeys(SHAPES), **FUNCTION}.items()}
    changed = []
    for name in ARCHITECTURE:
        counts = COUNTS_WHERE.get(name, lambda _: True)
        stored = theirs.get(name) is not None if name in SHAPES else True
        if stored and counts(theirs) and counts(mine) and _plain(theirs[name]) != _plain(mine[name]):
            changed.append(_tell(name, theirs[name], mine[name]))
    if changed:
        raise UserError(f"The checkpoint {folder} was trained with {', '.join(changed)}; give the checkpoint's values.")


def take_function(args: argparse.Namespace, saved: Arguments) -> None:
    """--use-checkpoint-args, for what Megatron leaves out of it: norms, epsilons, scaling of positions."""
    for name, default in FUNCTION.items():
        setattr(args, name, saved.get(name, default))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tell(name: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, bool) and isinstance(mine, bool):
        on, off = ("off", "on") if name in OPPOSITES else ("on", "off")
        flag = OPPOSITES.get(name) or FLAGS.get(name) or flag_of(name)
        return f"{flag} {on if theirs else off} (this run: {on if mine else off})"
    return f"{FLAGS.get(name) or flag_of(name)} {theirs} (this run: {mine})"
