"""Config files of Hugging Face models to architectures, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_recursive.accounting import padded_rows
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture, Yarn
from megatron_recursive.hf.convert.mappings import DONORS, FAMILIES, OWN, Family
from megatron_recursive.plan import RecursionConfig


def check_sizes(values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        size = values.get(name)
        if size is not None and (type(size) is not int or not 1 <= size < 2**31):
            raise UserError(f"The config.json of {where} has {name} {size!r}; it must be a whole number above 0.")


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; refuses what has no table, and what is quantised."""
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "an unknown method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{where} is quantised ({method}); give the unquantised model.")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(
            f"{where} has the model type {config.get('model_type')!r}, for which there is no table; known are "
            f"{', '.join(FAMILIES)}."
        )
    named = config.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        raise UserError(f"{where} is a {', '.join(map(str, named))}; only {family.architecture} can be converted.")
    return family


def read_config(family: Family, config: Any, where: str) -> Architecture:
    """The architecture of a transformers config object.

    Raises:
        UserError: an option that Megatron's model does not have.
    """
    values: dict[str, Any] = {key: getattr(config, name, None) for name, key in family.config.items()}
    values["activation"] = {"gelu_new": "gelu_pytorch_tanh"}.get(config.hidden_act, config.hidden_act)
    if values["activation"] != family.fixed.get("activation", values["activation"]):
        raise UserError(f"{where} has hidden_act {config.hidden_act}; a {family.model_type} model must have silu.")
    _refuse_sliding_window(config, where)
    values.update(_read_biases(config, where))
    if values["activation"] == "gelu_pytorch_tanh" and not values["linear_bias"]:
        raise UserError(f"{where} has hidden_act {config.hidden_act} without biases; Megatron approximates GELU by "
                        "tanh only beside biases of linear layers.")  # fmt: skip
    values.update(family.fixed)
    if family.recursion is not None:
        values.update(family.recursion.shape(config))
    values["head_dim"] = values["head_dim"] or config.hidden_size // config.num_attention_heads
    values["padded_vocab_size"] = padded_rows(config.vocab_size)
    values["tied"] = bool(values["tied"])
    if values["positions"] == "rope":
        values.update(_read_rope(config, where))
    arch = Architecture(**values, donor=None if family is OWN else family.model_type)
    if arch.num_attention_heads % arch.num_query_groups:
        raise UserError(f"{where}: {arch.num_query_groups} key-value heads do not divide {arch.num_attention_heads}.")
    return arch


def _read_biases(config: Any, where: str) -> dict[str, bool]:
    attention, mlp = (bool(getattr(config, name, False)) for name in ("attention_bias", "mlp_bias"))
    out = bool(getattr(config, "attention_out_bias", attention))
    everywhere = attention and out and mlp
    if not everywhere and (out or mlp):
        raise UserError(
            f"{where} has attention_bias {attention} and mlp_bias {mlp}; Megatron has biases on every linear layer, on "
            "q, k and v alone, or nowhere."
        )
    return {"qkv_bias": attention, "linear_bias": everywhere}


def _refuse_sliding_window(config: Any, where: str) -> None:
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise UserError(f"{where} has layers of the type {others[0]}; only full attention can be converted.")
    slides = not kinds or "sliding_attention" in kinds
    if slides and window is not None and window < config.max_position_embeddings:
        raise UserError(
            f"{where} attends to a sliding window of {window} tokens, shorter than its context of "
            f"{config.max_position_embeddings}; only full attention can be converted."
        )


def _read_rope(config: Any, where: str) -> dict[str, Any]:
    """Rotary options. Llama 3's frequency factors must be the constants that Megatron has built in."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))
    if base is None or base != int(base):
        raise UserError(f"{where} has rope_theta {base}; Megatron's --rotary-base is a whole number.")
    percent = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    values: dict[str, Any] = {"rotary_base": int(base), "rotary_percent": float(percent)}
    if kind == "llama3":
        for name, constant in (("low_freq_factor", 1), ("high_freq_factor", 4),
                               ("original_max_position_embeddings", 8192)):  # fmt: skip
            if rope.get(name) != constant:
                raise UserError(f"{where} has the rope {name} {rope.get(name)}; Megatron's is fixed at {constant}.")
        values["llama3_factor"] = float(rope["factor"])
    elif kind == "linear":
        if rope["factor"] != int(rope["factor"]):
            raise UserError(f"{where} has the linear rope factor {rope['factor']}; Megatron's is a whole number.")
        values["linear_factor"] = int(rope["factor"])
    elif kind == "yarn":
        if percent != 1.0:
            raise UserError(f"{where} rotates {percent:g} of each head under YaRN; Megatron's YaRN rotates all of it.")
        values["yarn"] = _read_yarn(rope, config)
    elif kind != "default":
        raise UserError(f"{where} has rope scaling of type {kind}; Megatron has default, linear, llama3 and yarn.")
    return values


def _read_yarn(rope: Mapping[str, Any], config: Any) -> Yarn:
    original = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    given, mscale, all_dim = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    if given is not None and factor > 1:
        mscale, all_dim = (given - 1) / (0.1 * math.log(factor)), 0.0
    elif not (mscale and all_dim):  # transformers reads both or none
        mscale, all_dim = 1.0, 0.0
    return Yarn(factor, original, float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1),
                float(mscale), float(all_dim), bool(rope.get("truncate", True)))  # fmt: skip


def rope_parameters(arch: Architecture) -> dict[str, Any]:
    """The inverse of what :func:`read_config` reads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(arch.rotary_base)}
    if arch.llama3_factor is not None:
        rope.update(rope_type="llama3", factor=arch.llama3_factor, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)  # fmt: skip
    elif arch.linear_factor is not None:
        rope.update(rope_type="linear", factor=float(arch.linear_factor))
    elif arch.yarn is not None:
        yarn = arch.yarn
        rope.update(rope_type="yarn", factor=yarn.factor, original_max_position_embeddings=yarn.original_positions,
                    beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow, truncate=yarn.truncate)  # fmt: skip
        if yarn.mscale and yarn.mscale_all_dim:
            rope.update(mscale=yarn.mscale, mscale_all_dim=yarn.mscale_all_dim)
        elif (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0):
            rope["attention_factor"] = yarn.attention_factor
    if arch.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = arch.rotary_percent
    return rope


def donor_family(arch: Architecture, recursion: RecursionConfig | None = None) -> Family | None:
    """The family whose own class computes what this architecture does (with this recursion), if there is one."""
    able = [family for family in DONORS if family.computes(arch, recursion)]
    return next((family for family in able if family.model_type == arch.donor), able[0] if able else None)


def config_values(family: Family, arch: Architecture, recursion: RecursionConfig | None = None) -> dict[str, Any]:
    """The architecture's part of a config.json, and the recursion's where the family is recursive in itself.

    A donor's rotary options stand there twice: as ``rope_parameters``, and as transformers 4 and what builds on it read
    them.
    """
    rope = rope_parameters(arch) if arch.positions == "rope" else None
    before = {}
    if rope is not None and family is not OWN:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        before = {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(arch, key) for name, key in family.config.items()},
        "rope_parameters": rope,
        **before,
        "attention_dropout": 0.0,
        **family.besides,
        **({} if family.recursion is None or recursion is None else family.recursion.config_of(arch, recursion)),
    }
