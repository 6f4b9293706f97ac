"""Ouro and Nanbeige, looped as they are published: their config.json as one of ours, and their tensors by our names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.configs import read_config, rope_parameters
from megatron_recursive.hf.convert.mappings import FAMILIES, OWN, Family, items, recursive_rows
from megatron_recursive.hf.convert.safetensors_files import FolderWriter
from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan

DTYPE = "dtype"  # its word in a config.json
_SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "hidden_act", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
         "pad_token_id")  # fmt: skip
_NEEDED = (*_SAME[:4], "max_position_embeddings", "num_hidden_layers", "rms_norm_eps")
_LOOPS = {"ouro": "total_ut_steps", "nanbeige": "num_loops"}
# What a config may turn on that is none of our model's.
_REFUSED = {
    "ouro": ("use_sliding_window",),
    "nanbeige": ("enable_double_loop_split", "enable_hyper_connection", "enable_mhc", "enable_depth_attention",
                 "emb_neighbor_num", "insert_ngram_layer_idx", "ngram_insert_all_layers", "loop_share_kv",
                 "qk_layernorm"),
}  # fmt: skip

# What else a published config says of a model.
_FURTHER: dict[str, Callable[[Architecture, RecursionPlan], dict[str, Any]]] = {
    "ouro": lambda arch, plan: {"early_exit_threshold": 1.0, "use_sliding_window": False, "sliding_window": None},
    "nanbeige": lambda arch, plan: {
        "skip_loop_final_norm": plan.state_norm == "none", "loop_loss_weights": [], "attention_bias": arch.qkv_bias,
        "mlp_bias": arch.linear_bias,
    },
}  # fmt: skip


def our_config(family: Family, values: Mapping[str, Any], where: str) -> RecursiveGPTConfig:
    """The config of our model that computes what a published config.json describes.

    Raises:
        UserError: it lacks a size, or turns on what our model has not.
    """
    kind = family.model_type
    for name in (*_NEEDED, _LOOPS[kind]):
        if values.get(name) is None:
            raise UserError(f"The config.json of {where} lacks {name}, which {family.architecture} needs.")
    for name in _REFUSED[kind]:
        if values.get(name):
            raise UserError(f"{where} has {name} {values[name]!r}, which this package's model does not have.")
    others = sorted({*(values.get("layer_types") or ())} - {"full_attention"})
    if others:
        raise UserError(f"{where} has layers of the type {others[0]}; only full attention can be converted.")
    weighed = values.get("loop_loss_weights")  # by which Nanbeige's own code counts its loops
    loops = len(weighed) + 1 if weighed else values[_LOOPS[kind]]
    recursion = RecursionConfig(
        recursion_family="looped", num_refinement_blocks=loops, halt_loss_weight=0.0,
        exit_gate=bool(family.added) and loops > 1,
        state_norm="none" if values.get("skip_loop_final_norm") else "final", embedding_multiplier=1.0,
    ).resolved(embedding_init_std=1.0)  # fmt: skip
    scaling = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {}),
               **(values.get("rope_parameters") or {})}  # fmt: skip
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    if scaling["rope_theta"] is None:
        raise UserError(f"The config.json of {where} lacks rope_theta, which {family.architecture} needs.")
    bias = bool(values.get("attention_bias"))
    return RecursiveGPTConfig.from_dict({
        **{name: values[name] for name in _SAME if name in values},
        "num_layers": values["num_hidden_layers"], "norm_eps": values["rms_norm_eps"], "rope_parameters": scaling,
        "norm_placement": family.fixed["norm_placement"], "attention_bias": bias, "attention_out_bias": bias,
        "mlp_bias": bool(values.get("mlp_bias")), "tie_word_embeddings": bool(values.get("tie_word_embeddings")),
        "dtype": values.get("dtype") or values.get("torch_dtype"),
        "plan": json.loads(build_plan(recursion).to_json()), "recursion": recursion.to_dict(),
    })  # fmt: skip


def published_config(arch: Architecture, recursion: RecursionConfig) -> dict[str, Any]:
    """The inverse of :func:`our_config`, without token ids.

    Raises:
        UserError: the published model does not compute this.
    """
    family, plan, rope = FAMILIES[str(arch.donor)], build_plan(recursion), rope_parameters(arch)
    theta, scaling = rope.pop("rope_theta"), {"type": rope.pop("rope_type"), **rope}
    values = {
        "architectures": [family.architecture], "model_type": family.model_type, _LOOPS[family.model_type]: plan.depth,
        **{name: getattr(arch, key) for name, key in family.config.items() if name in (*_SAME, "tie_word_embeddings")},
        "num_hidden_layers": arch.num_layers, "rms_norm_eps": arch.norm_eps, "rope_theta": theta,
        "rope_scaling": None if scaling["type"] == "default" else scaling, "attention_dropout": 0.0,
        **_FURTHER[family.model_type](arch, plan),
    }  # fmt: skip
    same = family.computes(arch)
    if same:
        config = our_config(family, values, family.model_type)
        read = replace(read_config(family, config, ""), padded_vocab_size=arch.padded_vocab_size)
        same = config.recursion_plan == plan and read == arch
    if not same:
        raise UserError(
            f"--as-published: {family.architecture} does not compute what this checkpoint does; leave the flag out."
        )
    return values


def writer(folder: Path, promised: dict[str, Tensor], shard_bytes: int, *_: Any) -> FolderWriter:
    return FolderWriter(folder, promised, shard_bytes)


def by_our_names(family: Family, config: RecursiveGPTConfig, fetch: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Tensors of a published checkpoint under the names of our model."""
    arch, plan = read_config(family, config, family.model_type), config.recursion_plan
    theirs = {item.name: [*item.hf] for item in items(family, arch, extra=recursive_rows(plan, family))}
    names = {ours: name for item in items(OWN, arch, extra=recursive_rows(plan))
             for ours, name in zip(item.hf, theirs[item.name], strict=True)}  # fmt: skip
    return lambda name: fetch(names.get(name, name))  # a tied head has no row
