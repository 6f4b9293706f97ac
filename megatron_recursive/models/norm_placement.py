"""Where a layer norms: in front of a branch, on its output, or both; and queries and keys per head or over all heads.

With x the residual stream, f a branch (attention, or the MLP), n1 the input norm and n2 the output norm, a branch is

| placement | scope ``branch`` (default) | scope ``residual`` |
|---|---|---|
| ``pre`` | x + f(n1 x) | |
| ``post`` | x + n2(f(x)): OLMo-2 | n2(x + f(x)): Tiny Recursive Models, HRM |
| ``sandwich`` | x + n2(f(n1 x)): Gemma-2, Ouro | n2(x + f(n1 x)): Huginn |

A bias of a branch's last projection belongs to the branch; dropout comes after n2 in the first column, and before the
sum in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_recursive.models.norms import FullProjectionNorm, SequenceParallelNorm, norm_together

PLACEMENTS = ("pre", "post", "sandwich")
OUTPUT_SCOPES = ("branch", "residual")
QK_SCOPES = ("head", "full")


@dataclass(frozen=True)
class NormLayout:
    """The norms of every layer; the fields are named as the flags are.

    Attributes:
        norm_placement: norms before the branches, on their outputs, or both.
        output_norm_scope: what an output norm is taken of: the branch, or its sum with the residual stream.
        qk_norm_scope: with ``qk_layernorm``, one norm per head (Qwen3), or one over all heads (OLMo-2).

    Raises:
        ValueError: an unknown value, or an output scope without output norms.
    """

    norm_placement: str = "pre"
    output_norm_scope: str = "branch"
    qk_norm_scope: str = "head"

    def __post_init__(self) -> None:
        known = {"norm_placement": PLACEMENTS, "output_norm_scope": OUTPUT_SCOPES, "qk_norm_scope": QK_SCOPES}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {getattr(self, name)}")
        if self.norm_placement == "pre" and self.output_norm_scope != "branch":
            raise ValueError("output_norm_scope residual needs norm_placement post or sandwich")

    @property
    def norms_per_layer(self) -> int:
        """Norms over the hidden size, of both branches together."""
        return 4 if self.norm_placement == "sandwich" else 2


class _NormsItsOutput(torch.nn.Module):
    """In front of a row-parallel projection of Megatron's: a norm on its output, bias included, after the sum.

    Under sequence parallelism the tensor-parallel sum leaves each rank its own tokens, which is what the norm works on.
    """

    norm: Callable[..., torch.nn.Module]

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = type(self).norm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        output_SBH, bias = super().forward(input_)
        return self.post_layernorm(output_SBH if bias is None else output_SBH + bias), None


class OutputNormLinear(_NormsItsOutput, RowParallelLinear):
    norm = SequenceParallelNorm


class NormedResidualAdd(torch.nn.Module):
    """Megatron's bias-dropout-add with a norm of the sum."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__()
        self.post_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Called as Megatron's ``get_bias_dropout_add``; what it returns takes (branch, bias), residual, dropout."""
        add = get_bias_dropout_add(training, fused)

        def add_and_norm(branch: tuple[Tensor, Tensor | None], residual_SBH: Tensor, dropout: float) -> Tensor:
            # Megatron turns gradients on around this call, in passes without gradient too; the branch tells.
            with torch.set_grad_enabled(branch[0].requires_grad):
                return self.post_layernorm(add(branch, residual_SBH, dropout))

        return add_and_norm


class FullQKNormSelfAttention(SelfAttention):
    """Self-attention that norms queries and keys over all heads, before the rotary embedding.

    NOTE the norms must not be called q_layernorm and k_layernorm: Megatron sums the gradients of parameters so named
    over tensor-parallel ranks (finalize_model_grads), whereas each rank's shard belongs to heads of its own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.fused_single_qkv_rope:
            raise ValueError("fused_single_qkv_rope leaves no place for qk_norm_scope full; turn either off")
        self.q_norm = FullProjectionNorm(config, config.num_attention_heads, self.pg_collection.tp)
        self.k_norm = FullProjectionNorm(config, config.num_query_groups, self.pg_collection.tp)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        query_SBND, key_SBND, *others = super().get_query_key_value_tensors(*args, **kwargs)
        return *norm_together([self.q_norm, self.k_norm], [query_SBND, key_SBND]), *others


def place_norms(
    layer: TransformerLayerSubmodules, config: TransformerConfig, layout: NormLayout, *, engine: bool = False
) -> None:
    """Give a layer spec, which is of placement ``pre``, the norms of a layout (in place).

    Args:
        engine: the spec is of Transformer Engine's modules, whose column-parallel projections hold the input norms;
            otherwise it is the local one.
    """
    attention, mlp = layer.self_attention.submodules, layer.mlp.keywords["submodules"]
    norm: Any = SequenceParallelNorm
    output_linear: Any = OutputNormLinear
    if engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        norm, output_linear = TENorm, _engine_output_norm_linear()
    if layout.norm_placement == "post":
        if engine:
            attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    if layout.norm_placement != "pre":
        if layout.output_norm_scope == "branch":
            attention.linear_proj = mlp.linear_fc2 = output_linear
        else:
            add = ModuleSpec(NormedResidualAdd, params={"config": config, "norm": norm})
            layer.self_attn_bda = layer.mlp_bda = add
    if config.qk_layernorm and layout.qk_norm_scope == "full":
        layer.self_attention.module = FullQKNormSelfAttention
        attention.q_layernorm = attention.k_layernorm = IdentityOp


def _engine_output_norm_linear() -> type[torch.nn.Module]:
    """:class:`OutputNormLinear` of Transformer Engine's parts, which are there only where it is installed."""
    from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear

    return type("TEOutputNormLinear", (_NormsItsOutput, TERowParallelLinear), {"norm": TENorm})
