"""Published recurrent models of the type ``huginn_raven``, read as models of ours under their own names.

Huginn-0125 (Geiping et al. 2025), and the Llamas and OLMos that were made recurrent in its shape (arXiv 2511.07384).
Their code differs, their ``config.json`` does not say how: the norms that a layer holds tell them apart. Huginn rotates
neighbouring numbers of a head, where ours rotates its halves, so that rows of q and k, and their biases, change places;
and its final norm also closes the last pass of the core. The retrofits do neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.configs import check_sizes, rope_parameters
from megatron_recursive.hf.convert.safetensors_files import DTYPES, FolderWriter, SafetensorsFolder
from megatron_recursive.hf.convert.transforms import half_split
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.plan.knobs import FunctionKnobs, flag_of, knobs_in

Part = tuple[str, Callable[[Tensor], Tensor]]  # a tensor of the original, and what ours is of it
DTYPE = "torch_dtype"  # its word in a config.json
STACKS = ("prelude", "core_block", "coda")
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
ROUNDED = 0.02  # how far a stored sine may lie from the exact one: bf16's rounding, or angles of float32
SIZES = ("n_embd", "n_heads", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
         "vocab_size", "n_layers_in_recurrent_block")  # fmt: skip
NORMS = {"sandwich": SANDWICH, "pre": SANDWICH[::2], "post": SANDWICH[1::2]}


class RenamedTensors:
    """A folder's tensors under other names; what has no other name keeps its own."""

    def __init__(self, tensors: SafetensorsFolder, parts: Mapping[str, Part]) -> None:
        self.tensors, self.parts = tensors, {n: part for n, part in parts.items() if part[0] in tensors.shapes}
        taken = {original for original, _ in parts.values()}
        self.parts.update({name: (name, _same) for name in tensors.shapes if name not in taken})
        self.shapes = {name: self._shape(*part) for name, part in self.parts.items()}
        self.dtypes = {name: tensors.dtypes[original] for name, (original, _) in self.parts.items()}
        self.nbytes, self._last = tensors.nbytes, ("", torch.empty(0))

    def _shape(self, original: str, part: Callable[[Tensor], Tensor]) -> tuple[int, ...]:
        stored = self.tensors.shapes[original]
        try:
            return tuple(part(torch.empty(stored, device="meta")).shape)
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{original} of {self.tensors.folder} has the shape {' x '.join(map(str, stored))}, which "
                            "does not fit its config.json.") from error  # fmt: skip

    @property
    def bytes_read(self) -> int:
        return self.tensors.bytes_read

    def get(self, name: str) -> Tensor:
        original, part = self.parts[name]
        if self._last[0] != original:  # several of ours are parts of one
            self._last = original, self.tensors.get(original)
        return part(self._last[1]).contiguous()


def open_raven(
    values: Mapping[str, Any], tensors: SafetensorsFolder, where: str
) -> tuple[dict[str, Any], RenamedTensors]:
    """What a config.json of ours would say, and the tensors by our names.

    Raises:
        UserError: it computes what our model does not.
    """
    held = {suffix for suffix in ("norm_4", "attn.q_norm") if any(f".{suffix}." in name for name in tensors.shapes)}
    placement = "sandwich" if "norm_4" in held else "post" if "attn.q_norm" in held else "pre"
    is_huginn = placement == "sandwich"
    for name, known in (("injection_type", ("linear",)), ("state_init", ("like-init",)), ("bias", (False,)),
                        ("initial_state_mode", ("random", "embed-init")), ("test_time_noise", (0,))):  # fmt: skip
        if values.get(name, known[0]) not in known:
            raise UserError(f"{where} has {name} {values[name]!r}; of this kind of model only "
                            f"{' and '.join(map(repr, known))} can be converted.")  # fmt: skip
    check_sizes(values, SIZES, where)
    try:
        config = _config(values, placement)
        recursion = RecursionConfig(**_knobs(values, is_huginn)).resolved(embedding_init_std=1.0)
        parts = _parts(values, config, placement)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"The config.json of {where} is no config of this kind of model ({type(error).__name__}: "
                        f"{error}); fetch the model again.") from error  # fmt: skip
    if is_huginn:
        _check_angles(tensors, config)
    config.update(plan=json.loads(build_plan(recursion).to_json()), recursion=recursion.to_dict())
    return config, RenamedTensors(tensors, parts)


def _config(values: Mapping[str, Any], placement: str) -> dict[str, Any]:
    width, heads = values["n_embd"], values.get("n_heads") or values["num_attention_heads"]
    is_huginn = placement == "sandwich"
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = values.get("rope_base", 50000.0) if is_huginn else values["rope_theta"]
    return {
        "model_type": "recursive_gpt", "vocab_size": values["vocab_size"], "hidden_size": width,
        "intermediate_size": values["intermediate_size"], "num_attention_heads": heads,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": (None if placement == "pre" else values.get("head_dim")) or width // heads,
        "num_layers": sum(values[f"n_layers_in_{name}"] for name in ("prelude", "recurrent_block", "coda")),
        "norm_eps": values.get("norm_eps", 1e-6), "norm_placement": placement,
        "output_norm_scope": "residual" if is_huginn else "branch", "qk_norm": "full" if placement == "post" else None,
        "attention_bias": bool(values.get("qk_bias", True)), "rope_parameters": rope,
        "max_position_embeddings": values.get("block_size", 4096) if is_huginn else values["max_position_embeddings"],
        "tie_word_embeddings": bool(values.get("tie_embeddings", True)),
        "dtype": values.get("dtype") or values.get("torch_dtype"),
        **{name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }  # fmt: skip


def _knobs(values: Mapping[str, Any], is_huginn: bool) -> dict[str, Any]:
    """``init_values`` keeps the scale and the deviation that a model was made with; without it they are Huginn's."""
    width, stated = values["n_embd"], values.get("init_values") or {}
    scale = float(stated.get("embed_scale", math.sqrt(width)))
    recurrences, window = values.get("mean_recurrence", 32), values.get("mean_backprop_depth", 8)
    sampled = {"state_init": "sampled", "state_std": stated.get("std", math.sqrt(2 / (5 * width))) * scale}
    return {
        "recursion_family": "recurrent", "num_prelude_layers": values["n_layers_in_prelude"],
        "num_coda_layers": values["n_layers_in_coda"], "num_recurrences": recurrences,
        "backprop_depth": window if window < recurrences else 0, "injection": "concat", "embedding_multiplier": scale,
        **({} if values.get("initial_state_mode") == "embed-init" else sampled),
        **({"state_norm": "core-end"} if is_huginn else {}),
    }  # fmt: skip


def _check_angles(tensors: SafetensorsFolder, config: Mapping[str, Any]) -> None:
    """Huginn's class rotates by the table that is stored with its weights, ours by the one that its config gives."""
    size, positions = config["head_dim"], config["max_position_embeddings"]
    theta = config["rope_parameters"]["rope_theta"]
    if type(theta) not in (int, float):
        return  # is refused where numbers are checked
    if tensors.shapes.get("freqs_cis") != (1, positions, 1, size // 2, 2) or tensors.dtypes["freqs_cis"] not in DTYPES:
        return  # its class could not load it, and no other tensor fits
    angles = torch.outer(torch.arange(positions).double(), theta ** -(torch.arange(0, size, 2).double() / size))
    stored = tensors.get("freqs_cis")[0, :, 0].double()
    if not (stored - torch.stack([angles.cos(), angles.sin()], -1)).abs().max() < ROUNDED:
        raise UserError(f"freqs_cis of {tensors.folder} does not hold the rotations of base {theta:g}, which its "
                        "config.json says; it cannot be converted.")  # fmt: skip


def _parts(values: Mapping[str, Any], config: Mapping[str, Any], placement: str) -> dict[str, Part]:
    counts = [values[f"n_layers_in_{name}"] for name in ("prelude", "recurrent_block", "coda")]
    places = [f"transformer.{stack}.{i}." for stack, count in zip(STACKS, counts, strict=True) for i in range(count)]
    heads, groups, size = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    queries, keys = heads * size, groups * size
    turned = half_split if placement == "sandwich" else _as_it_is
    parts: dict[str, Part] = {f"model.{ours}.weight": (f"transformer.{theirs}.weight", _same) for ours, theirs in (
        ("embed_tokens", "wte"), ("norm", "ln_f"), ("adapter", "adapter"))}  # fmt: skip
    for layer, place in enumerate(places):
        ours, qkv, bias, mlp = f"model.layers.{layer}.", *(f"{place}{x}" for x in (
            "attn.Wqkv.weight", "attn.qk_bias", "mlp.fc.weight"))  # fmt: skip
        parts.update({
            f"{ours}self_attn.q_proj.weight": (qkv, lambda x: turned(x[:queries], heads)),
            f"{ours}self_attn.k_proj.weight": (qkv, lambda x: turned(x[queries : queries + keys], groups)),
            f"{ours}self_attn.v_proj.weight": (qkv, lambda x: x[queries + keys :]),
            f"{ours}self_attn.o_proj.weight": (f"{place}attn.proj.weight", _same),
            f"{ours}mlp.gate_proj.weight": (mlp, lambda x: x.chunk(2)[0]),
            f"{ours}mlp.up_proj.weight": (mlp, lambda x: x.chunk(2)[1]),
            f"{ours}mlp.down_proj.weight": (f"{place}mlp.proj.weight", _same),
            f"{ours}self_attn.q_proj.bias": (bias, lambda x: turned(x[0].flatten(), heads)),
            f"{ours}self_attn.k_proj.bias": (bias, lambda x: turned(x[1].flatten(), groups)),
            f"{ours}self_attn.v_proj.bias": (bias, lambda x: torch.zeros_like(x[1].flatten())),
            **{f"{ours}self_attn.{x}_norm.weight": (f"{place}attn.{x}_norm.weight", _same) for x in "qk"},
            **{f"{ours}{norm}.weight": (f"{place}norm_{number}.weight", _same)
               for number, norm in enumerate(NORMS[placement], 1)},
        })  # fmt: skip
    return parts


def _as_it_is(rows: Tensor, _: int) -> Tensor:
    return rows


def _same(tensor: Tensor) -> Tensor:
    return tensor


# --- the way back ---------------------------------------------------------------------------------------------------


def published_config(arch: Architecture, recursion: RecursionConfig) -> dict[str, Any]:
    """The config.json of which :func:`open_raven` makes this model, without token ids.

    Raises:
        UserError: the format has no word for something of it.
    """
    if recursion.recursion_family != "recurrent" or not recursion.enable_recursive_refinement:
        family = recursion.recursion_family if recursion.enable_recursive_refinement else "none (a plain GPT)"
        raise UserError(f"--as-published: a huginn_raven is recurrent, but --recursion-family is {family}; leave "
                        "--as-published out.")  # fmt: skip
    width, depth, is_huginn = arch.hidden_size, recursion.num_recurrences, arch.norm_placement == "sandwich"
    plan = build_plan(recursion)
    core, applied = len(plan.layers_of(arch.num_layers)["core"]), plan.unrolled_layers(arch.num_layers)
    scale, std = recursion.embedding_multiplier or 1.0, math.sqrt(2 / (5 * width))
    if recursion.state_init == "sampled" and not math.isclose(std * scale, recursion.state_std, rel_tol=1e-12):
        std = recursion.state_std / scale
    rope = rope_parameters(arch)
    theta = rope.pop("rope_theta")
    rotation = {"block_size": arch.max_positions} if is_huginn else {
        "max_position_embeddings": arch.max_positions, "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope}  # fmt: skip
    values = {
        "architectures": ["RavenForCausalLM"], "model_type": "huginn_raven", "n_embd": width,
        "n_heads": arch.num_attention_heads, "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups, "head_dim": arch.head_dim, "n_layers": arch.num_layers,
        "n_layers_in_prelude": recursion.num_prelude_layers, "n_layers_in_recurrent_block": core,
        "n_layers_in_coda": recursion.num_coda_layers, "intermediate_size": arch.ffn_hidden_size,
        "vocab_size": arch.vocab_size, "norm_eps": arch.norm_eps, "qk_bias": arch.qkv_bias, "bias": False,
        "tie_embeddings": arch.tied, "rope_base": theta, **rotation, "injection_type": "linear",
        "state_init": "like-init",
        "initial_state_mode": "random" if recursion.state_init == "sampled" else "embed-init",
        "mean_recurrence": depth, "mean_backprop_depth": recursion.backprop_depth or depth,
        "init_values": {"std": std, "embedding": std, "out_proj": std / math.sqrt(2 * applied), "embed_scale": scale},
    }  # fmt: skip
    _check_expressed(values, arch, recursion)
    return values


def _check_expressed(values: Mapping[str, Any], arch: Architecture, recursion: RecursionConfig) -> None:
    """Refuses, by its flag, what is lost where the config is read again."""
    placement = arch.norm_placement
    is_huginn = placement == "sandwich"
    again = RecursionConfig(**_knobs(values, is_huginn))
    mine, theirs = (knobs_in(vars(each), (FunctionKnobs,)) for each in (recursion, again))
    lost = {flag_of(name): value for name, value in mine.items() if value != theirs[name] and not (
        isinstance(value, float) and math.isclose(value, theirs[name], rel_tol=1e-12))}  # fmt: skip
    if is_huginn and not math.isclose(recursion.embedding_multiplier or 1.0, math.sqrt(arch.hidden_size)):
        lost["--embedding-multiplier"] = recursion.embedding_multiplier  # its class computes it
    if is_huginn and (arch.llama3_factor or arch.linear_factor or arch.yarn):
        lost["rope scaling"] = "on"
    if arch.num_query_groups != arch.num_attention_heads and arch.qkv_bias:
        lost["--add-qkv-bias"] = f"with {arch.num_query_groups} query groups"
    if placement != "post" and arch.head_dim * arch.num_attention_heads != arch.hidden_size:
        lost["--kv-channels"] = arch.head_dim
    kept = {"norm": "rmsnorm", "norm_one_centered": False, "norm_weights": "learned", "attention_gate": False,
            "activation": "silu", "gated": True, "linear_bias": False, "positions": "rope", "rotary_percent": 1.0,
            "qk_norm": "full" if placement == "post" else None,
            "output_norm_scope": "residual" if is_huginn else "branch"}  # fmt: skip
    lost.update({name: getattr(arch, name) for name, value in kept.items() if getattr(arch, name) != value})
    if lost:
        name, value = next(iter(lost.items()))
        raise UserError(f"--as-published: a huginn_raven of this kind does not hold {name} {value}; leave "
                        "--as-published out.")  # fmt: skip


class JoinedWriter:
    """Takes tensors by our names, and writes those of the original that they are parts of.

    All parts of one come one after another.
    """

    def __init__(self, folder: Path, promised: Mapping[str, Tensor], shard_bytes: int, arch: Architecture,
                 values: Mapping[str, Any]) -> None:  # fmt: skip
        self.arch = arch
        self.held: dict[str, Tensor] = {}
        parts = _parts(values, _config(values, arch.norm_placement), arch.norm_placement)
        self.original_of = {name: parts[name][0] if name in parts else name for name in promised}
        self.originals: dict[str, list[str]] = {}  # to our names, which come as they are joined: q, k, v; gate, up
        for ours, original in self.original_of.items():
            self.originals.setdefault(original, []).append(ours)
        joined = {name: self._join(name, [promised[each] for each in ours]) for name, ours in self.originals.items()}
        self.angles = None
        if arch.norm_placement == "sandwich":  # its class loads the table of its rotations
            self.angles = rotations(arch.head_dim, arch.max_positions, arch.rotary_base)
            joined["freqs_cis"] = torch.empty_like(self.angles, device="meta")
        self.writer = FolderWriter(folder, joined, shard_bytes)

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        turned = interleaved if self.arch.norm_placement == "sandwich" else _as_it_is
        heads, groups, size = self.arch.num_attention_heads, self.arch.num_query_groups, self.arch.head_dim
        if name.endswith((".Wqkv.weight", ".qk_bias")):
            q, k, v = parts
            q, k = turned(q, heads), turned(k, groups)
            return torch.cat([q, k, v]) if name.endswith("weight") else torch.stack([q, k]).view(2, 1, heads, size)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def add(self, name: str, tensor: Tensor) -> None:
        if name.endswith("v_proj.bias") and tensor.any():
            raise UserError(f"--as-published: {name} has been trained, and a huginn_raven has biases on q and k alone; "
                            "leave --as-published out.")  # fmt: skip
        self.held[name], original = tensor, self.original_of[name]
        if all(each in self.held for each in self.originals[original]):
            parts = [self.held.pop(each) for each in self.originals[original]]
            self.writer.add(original, self._join(original, parts))

    def close(self) -> None:
        if self.angles is not None:
            self.writer.add("freqs_cis", self.angles)
        self.writer.close()


writer = JoinedWriter


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`half_split`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rotations(size: int, positions: int, theta: float) -> Tensor:
    """The table that Huginn's class keeps with its weights, in its own arithmetic."""
    angles = torch.outer(torch.arange(positions).float(), 1.0 / theta ** (torch.arange(0, size, 2).float() / size))
    return torch.stack([angles.cos(), angles.sin()], -1)[None, :, None].contiguous()
