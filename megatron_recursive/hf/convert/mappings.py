"""Which Hugging Face tensor becomes which Megatron tensor: one table a family (configs.py reads their configs).

A table's row is ``Row(Megatron's key, transform, {HF name: shape})``. Layer rows leave out ``decoder.layers.`` and
``model.layers.{i}.``. Shapes are written in symbols: h hidden, q = heads x head_dim, k = groups x head_dim, d head_dim,
f the MLP's width, v the true vocabulary, p positions; in one, g gate, q, k and v, and u gate and up. A row with
``when`` exists only for such an architecture.
Megatron keeps a pre-norm's weight beside the linear layer that follows it (``linear_qkv.layer_norm_weight``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from megatron_recursive.hf.convert import hrm_text
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.torch_dist import LAYERS
from megatron_recursive.hf.convert.transforms import (
    COPY,
    FLAT,
    GATE_UP,
    GQKV,
    ONES,
    QKV,
    SAME,
    VOCABULARY,
    Transform,
)
from megatron_recursive.plan import RecursionConfig, RecursionPlan
from megatron_recursive.plan.added_parameters import AddedParameter, added_parameters

Condition = Callable[[Architecture], bool]


def _always(_: Architecture) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    megatron: str
    transform: Transform
    hf: Mapping[str, str]
    when: Condition = _always


# --- the tables -----------------------------------------------------------------------------------------------------

_EMBEDDING = Row("embedding.word_embeddings.weight", VOCABULARY, {"model.embed_tokens.weight": "v h"})
_FINAL_NORM = Row("decoder.final_layernorm.weight", COPY, {"model.norm.weight": "h"})
_HEAD = Row("output_layer.weight", VOCABULARY, {"lm_head.weight": "v h"}, when=lambda a: not a.tied)

def _qkv(kind: str, gate: tuple[str, ...] = ()) -> Row:
    sizes = {x: ("k" if x in "kv" else "q") + " h" * (kind == "weight") for x in ("q", *gate, "k", "v")}
    return Row(f"self_attention.linear_qkv.{kind}", QKV, {f"self_attn.{x}_proj.{kind}": n for x, n in sizes.items()},
               when=lambda a: a.attention_gate == bool(gate) and (kind == "weight" or a.qkv_bias))  # fmt: skip


_QKV_WEIGHT, _QKV_BIAS = _qkv("weight"), _qkv("bias")
_PROJ = Row("self_attention.linear_proj.weight", COPY, {"self_attn.o_proj.weight": "h q"})
_GATE_UP = Row("mlp.linear_fc1.weight", GATE_UP, {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"},
               when=lambda a: a.gated)
_DOWN = Row("mlp.linear_fc2.weight", COPY, {"mlp.down_proj.weight": "h f"})

# Llama 1, 2, 3.x, TinyLlama, SmolLM, SmolLM2, and Mistral: norms before attention and MLP, SwiGLU, rotary positions,
# no biases. Some descendants have one on every linear layer (attention_bias and mlp_bias).
LLAMA = (
    Row("self_attention.linear_qkv.layer_norm_weight", COPY, {"input_layernorm.weight": "h"}),
    _QKV_WEIGHT,
    _QKV_BIAS,
    _PROJ,
    Row("self_attention.linear_proj.bias", COPY, {"self_attn.o_proj.bias": "h"}, when=lambda a: a.linear_bias),
    Row("mlp.linear_fc1.layer_norm_weight", COPY, {"post_attention_layernorm.weight": "h"}),
    _GATE_UP,
    Row("mlp.linear_fc1.bias", GATE_UP, {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f"},
        when=lambda a: a.linear_bias),
    _DOWN,
    Row("mlp.linear_fc2.bias", COPY, {"mlp.down_proj.bias": "h"}, when=lambda a: a.linear_bias),
)

# Qwen2, Qwen2.5: Llama with a bias on q, k and v alone.
QWEN2 = (
    Row("self_attention.linear_qkv.layer_norm_weight", COPY, {"input_layernorm.weight": "h"}),
    _QKV_WEIGHT,
    _QKV_BIAS,
    _PROJ,
    Row("mlp.linear_fc1.layer_norm_weight", COPY, {"post_attention_layernorm.weight": "h"}),
    _GATE_UP,
    _DOWN,
)

# Qwen3: no bias, a norm over each head of q and of k before the rotation, head_dim given apart.
QWEN3 = (
    Row("self_attention.linear_qkv.layer_norm_weight", COPY, {"input_layernorm.weight": "h"}),
    _QKV_WEIGHT,
    Row("self_attention.q_layernorm.weight", COPY, {"self_attn.q_norm.weight": "d"}),
    Row("self_attention.k_layernorm.weight", COPY, {"self_attn.k_norm.weight": "d"}),
    _PROJ,
    Row("mlp.linear_fc1.layer_norm_weight", COPY, {"post_attention_layernorm.weight": "h"}),
    _GATE_UP,
    _DOWN,
)

# OLMo-2: no norm before, but one on what attention and MLP add to the residual stream; q and k normed over all heads.
OLMO2 = (
    _QKV_WEIGHT,
    Row("self_attention.q_norm.weight", COPY, {"self_attn.q_norm.weight": "q"}),
    Row("self_attention.k_norm.weight", COPY, {"self_attn.k_norm.weight": "k"}),
    _PROJ,
    Row("self_attention.linear_proj.post_layernorm.weight", COPY, {"post_attention_layernorm.weight": "h"}),
    _GATE_UP,
    _DOWN,
    Row("mlp.linear_fc2.post_layernorm.weight", COPY, {"post_feedforward_layernorm.weight": "h"}),
)


def _norm(megatron: str, hf: str, when: Condition) -> tuple[Row, ...]:
    """Weight, and under LayerNorm bias, of one norm. ``megatron`` ends where "weight" or "bias" follows."""
    return (Row(f"{megatron}weight", COPY, {f"{hf}.weight": "h"},
                when=lambda a: when(a) and a.norm_weights == "learned"),
            Row(f"{megatron}weight", ONES, {}, when=lambda a: when(a) and a.norm_weights == "ones"),
            Row(f"{megatron}bias", COPY, {f"{hf}.bias": "h"}, when=lambda a: when(a) and a.norm == "layernorm"))


def _normed_before(arch: Architecture) -> bool:
    return arch.norm_placement in ("pre", "sandwich")


def _branch_normed(arch: Architecture) -> bool:
    return arch.norm_placement in ("post", "sandwich") and arch.output_norm_scope == "branch"


def _sum_normed(arch: Architecture) -> bool:
    return arch.norm_placement in ("post", "sandwich") and arch.output_norm_scope == "residual"


def _qk_norm(letter: str, scope: str) -> tuple[Row, Row]:
    module, shape = (f"{letter}_layernorm", "d") if scope == "head" else (f"{letter}_norm", letter)
    megatron, hf = f"self_attention.{module}", f"self_attn.{letter}_norm"
    return (
        Row(f"{megatron}.weight", COPY, {f"{hf}.weight": shape}, when=lambda a: a.qk_norm == scope),
        Row(f"{megatron}.bias", COPY, {f"{hf}.bias": shape},
            when=lambda a: a.qk_norm == scope and a.norm == "layernorm"),
    )


# Ouro: a norm before attention and MLP, and one on what each adds, under names that tell neither.
OURO = (
    Row("self_attention.linear_qkv.layer_norm_weight", COPY, {"input_layernorm.weight": "h"}),
    _QKV_WEIGHT,
    _PROJ,
    Row("self_attention.linear_proj.post_layernorm.weight", COPY, {"input_layernorm_2.weight": "h"}),
    Row("mlp.linear_fc1.layer_norm_weight", COPY, {"post_attention_layernorm.weight": "h"}),
    _GATE_UP,
    _DOWN,
    Row("mlp.linear_fc2.post_layernorm.weight", COPY, {"post_attention_layernorm_2.weight": "h"}),
)

# Our own model (modeling_recursive_gpt.py): every option of the Megatron model, norms with Gemma-2's names.
RECURSIVE_GPT = (
    *_norm("self_attention.linear_qkv.layer_norm_", "input_layernorm", _normed_before),
    _QKV_WEIGHT,
    _QKV_BIAS,
    _qkv("weight", ("gate",)),
    _qkv("bias", ("gate",)),
    *_qk_norm("q", "head"), *_qk_norm("k", "head"), *_qk_norm("q", "full"), *_qk_norm("k", "full"),
    _PROJ,
    Row("self_attention.linear_proj.bias", COPY, {"self_attn.o_proj.bias": "h"}, when=lambda a: a.linear_bias),
    *_norm("self_attention.linear_proj.post_layernorm.", "post_attention_layernorm", _branch_normed),
    *_norm("self_attn_bda.post_layernorm.", "post_attention_layernorm", _sum_normed),
    *_norm("mlp.linear_fc1.layer_norm_", "pre_feedforward_layernorm", _normed_before),
    _GATE_UP,
    Row("mlp.linear_fc1.weight", COPY, {"mlp.up_proj.weight": "f h"}, when=lambda a: not a.gated),
    Row("mlp.linear_fc1.bias", GATE_UP, {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f"},
        when=lambda a: a.linear_bias and a.gated),
    Row("mlp.linear_fc1.bias", COPY, {"mlp.up_proj.bias": "f"}, when=lambda a: a.linear_bias and not a.gated),
    _DOWN,
    Row("mlp.linear_fc2.bias", COPY, {"mlp.down_proj.bias": "h"}, when=lambda a: a.linear_bias),
    *_norm("mlp.linear_fc2.post_layernorm.", "post_feedforward_layernorm", _branch_normed),
    *_norm("mlp_bda.post_layernorm.", "post_feedforward_layernorm", _sum_normed),
)  # fmt: skip

# HRM-Text: no norm has a weight, attention is gated, projections are merged. See hrm_text.py.
HRM_LAYERS = (
    Row("self_attention.linear_qkv.layer_norm_weight", ONES, {}),
    Row("self_attention.linear_qkv.weight", GQKV, {"attn.gqkv_proj.weight": "g h"}),
    Row("self_attention.linear_proj.weight", COPY, {"attn.o_proj.weight": "h q"}),
    Row("mlp.linear_fc1.layer_norm_weight", ONES, {}),
    Row("mlp.linear_fc1.weight", COPY, {"mlp.gate_up_proj.weight": "u h"}),
    _DOWN,
)

_TOP = (_EMBEDDING, _FINAL_NORM, _HEAD)
_RECURSIVE_TOP = (
    _EMBEDDING,
    Row("embedding.position_embeddings.weight", COPY, {"model.embed_positions.weight": "p h"},
        when=lambda a: a.positions == "learned"),
    *_norm("decoder.final_layernorm.", "model.norm", _always),
    _HEAD,
)


def added_row(each: AddedParameter, names: Mapping[str, str] = {}) -> Row:  # noqa: B006  (it is read alone)
    """The row of what recursion adds; ``names``: our name to another one."""
    return Row(each.key, FLAT if each.is_flat else COPY, {names.get(each.exported, each.exported): each.shape})


def recursive_rows(plan: RecursionPlan, family: Family | None = None) -> tuple[Row, ...]:
    return tuple(added_row(each, {} if family is None else family.added) for each in added_parameters(plan))


# Names in a config.json to the fields of an architecture.
_CONFIG = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_query_groups", "head_dim": "head_dim",
    "hidden_act": "activation", "max_position_embeddings": "max_positions", "tie_word_embeddings": "tied",
    "initializer_range": "init_std",
}  # fmt: skip
_DONOR_CONFIG = {**_CONFIG, "num_hidden_layers": "num_layers", "rms_norm_eps": "norm_eps"}
_BIASES = {"attention_bias": "linear_bias", "mlp_bias": "linear_bias"}
_OWN_CONFIG = {
    **_CONFIG, **_BIASES, "num_layers": "num_layers", "attention_bias": "qkv_bias", "attention_out_bias": "linear_bias",
    "attention_gate": "attention_gate", "norm_weights": "norm_weights",
    "mlp_gated": "gated", "norm_type": "norm", "norm_eps": "norm_eps", "layernorm_one_centered": "norm_one_centered",
    "qk_norm": "qk_norm", "norm_placement": "norm_placement", "output_norm_scope": "output_norm_scope",
    "position_embedding": "positions",
}  # fmt: skip
# Fields of an architecture in which a donor's class leaves no choice.
_DONOR_FIXED = {
    "norm": "rmsnorm", "norm_one_centered": False, "norm_placement": "pre", "output_norm_scope": "branch",
    "norm_weights": "learned", "attention_gate": False,
    "qk_norm": None, "gated": True, "activation": "silu", "positions": "rope", "rotary_percent": 1.0,
}  # fmt: skip
_UNBIASED = {**_DONOR_FIXED, "qkv_bias": False, "linear_bias": False}


@dataclass(frozen=True)
class Family:
    """A table, the model type and class that it belongs to, and how their config tells an architecture.

    Attributes:
        architecture: transformers' class, as config.json names it.
        config: names in config.json to fields of :class:`Architecture`; fixed: fields that have one value.
        when: what else must hold of an architecture that the class is to compute.
        besides: further entries of a config.json.
        recursion: of a type of transformers' that is recursive in itself, the module that knows its plan (hrm_text.py).
        own_class: transformers has no class for it; its model is ours (published_looped.py turns its config into ours).
        added: what recursion adds, by our name, to its name.
        told_by_tensors: its config.json does not say all that it is (published_recurrent.py reads it beside them).
    """

    model_type: str
    architecture: str
    layer_rows: tuple[Row, ...]
    fixed: Mapping[str, Any]
    config: Mapping[str, str] = field(default_factory=lambda: _DONOR_CONFIG)
    when: Condition = _always
    besides: Mapping[str, Any] = field(default_factory=dict)
    top_rows: tuple[Row, ...] = _TOP
    recursion: ModuleType | None = None
    own_class: bool = False
    added: Mapping[str, str] = field(default_factory=dict)
    told_by_tensors: bool = False

    def computes(self, arch: Architecture, recursion: RecursionConfig | None = None) -> bool:
        """Whether its class can be this architecture, with this recursion or none."""
        if self.recursion is None:
            able = recursion is None or not recursion.enable_recursive_refinement
        else:
            able = recursion is not None and self.recursion.expresses(recursion)
        return able and all(getattr(arch, name) == value for name, value in self.fixed.items()) and self.when(arch)


# A plain GPT is exported as what it came from, or else as the first that computes it.
DONORS = (
    Family("llama", "LlamaForCausalLM", LLAMA, _DONOR_FIXED, {**_DONOR_CONFIG, **_BIASES},
           when=lambda a: a.qkv_bias == a.linear_bias and a.hidden_size % a.num_attention_heads == 0),
    Family("mistral", "MistralForCausalLM", LLAMA, _UNBIASED, besides={"sliding_window": None}),
    Family("qwen2", "Qwen2ForCausalLM", QWEN2, {**_UNBIASED, "qkv_bias": True}),
    Family("qwen3", "Qwen3ForCausalLM", QWEN3, {**_UNBIASED, "qk_norm": "head"}),
    Family("olmo2", "Olmo2ForCausalLM", OLMO2, {**_UNBIASED, "qk_norm": "full", "norm_placement": "post"},
           when=lambda a: a.head_dim * a.num_attention_heads == a.hidden_size),
    Family("hrm_text", "HrmTextForCausalLM", HRM_LAYERS,
           {**_UNBIASED, "norm_weights": "ones", "attention_gate": True, "tied": False},
           {name: key for name, key in _DONOR_CONFIG.items() if key not in ("num_layers", "num_query_groups")},
           when=lambda a: a.num_query_groups == a.num_attention_heads and a.hidden_size % a.num_attention_heads == 0,
           top_rows=(_EMBEDDING, Row("decoder.final_layernorm.weight", ONES, {}), _HEAD), recursion=hrm_text,
           added={"model.initial_latent": "model.z_L_init"}),
)  # fmt: skip
OWN = Family("recursive_gpt", "RecursiveGPTForCausalLM", RECURSIVE_GPT, {}, _OWN_CONFIG, top_rows=_RECURSIVE_TOP,
             own_class=True)  # fmt: skip
# Checkpoints that are recursive as they are published.
PUBLISHED = (
    Family("ouro", "OuroForCausalLM", OURO, {**_UNBIASED, "norm_placement": "sandwich"}, _OWN_CONFIG, own_class=True,
           added={f"exit_gate.{each}": f"model.early_exit_gate.{each}" for each in ("weight", "bias")}),
    Family("nanbeige", "NanbeigeForCausalLM", LLAMA, _DONOR_FIXED, _OWN_CONFIG, own_class=True),
    # By our names: published_recurrent.py renames its tensors.
    Family("huginn_raven", "RavenForCausalLM", RECURSIVE_GPT, {}, _OWN_CONFIG, top_rows=_RECURSIVE_TOP, own_class=True,
           told_by_tensors=True),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in (*DONORS, OWN, *PUBLISHED)}


@dataclass(frozen=True)
class Item:
    """One Megatron tensor (a layer of it) and the HF tensors that it is made of.

    Attributes:
        key, layer: in the checkpoint; layer is None for tensors that no layer holds.
        hf: full HF names to shapes.
    """

    key: str
    layer: int | None
    transform: Transform
    hf: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The key, with the layer's number in it."""
        return self.key if self.layer is None else f"{LAYERS}{self.layer}.{self.key.removeprefix(LAYERS)}"

    def megatron_shape(self, arch: Architecture) -> tuple[int, ...]:
        """Of the merged tensor, without the axis of the layers."""
        if self.transform is ONES:
            return (arch.hidden_size,)
        if self.transform.name == SAME:
            return next(iter(self.hf.values()))
        if self.transform is FLAT:
            return (math.prod(next(iter(self.hf.values()))),)
        rows, *rest = next(iter(self.hf.values()))
        if self.transform is VOCABULARY:
            return (arch.padded_vocab_size, *rest)
        return (sum(shape[0] for shape in self.hf.values()), *rest)


def items(
    family: Family, arch: Architecture, layers: list[int] | None = None, extra: tuple[Row, ...] = ()
) -> Iterator[Item]:
    """Every tensor of a model, in the order of the layers.

    Args:
        layers: HF layer that each Megatron layer is taken from; None for all in order.
        extra: rows of what recursion adds.
    """
    top = [row for row in (*family.top_rows, *extra) if row.when(arch)]
    yield from (Item(row.megatron, None, row.transform, _shapes(row, arch)) for row in top)
    for layer, source in enumerate(layers or range(arch.num_layers)):
        for row in family.layer_rows:
            if row.when(arch):
                own = family.recursion
                prefix = f"model.layers.{source}." if own is None else own.layer_prefix(source, arch.num_layers)
                shapes = _shapes(row, arch, prefix)
                yield Item(LAYERS + row.megatron, layer, row.transform, shapes)


def _shapes(row: Row, arch: Architecture, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(map(arch.dimension, shape.split())) for name, shape in row.hf.items()}
