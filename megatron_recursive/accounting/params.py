"""How many parameters a recursive model holds, and how many a plain model of its unrolled depth would hold."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_recursive.plan import RecursionPlan


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a dense GPT, in the names of Megatron's flags; ``vocab_size`` is the padded one."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    seq_length: int
    learned_positions: int = 0
    gated_linear_unit: bool = False
    tied_embeddings: bool = True
    linear_bias: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_bias: bool = True

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        return 2 * self.num_query_groups * self.kv_channels


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by group; ``held`` is what the model stores, ``unrolled`` counts the layers once per pass."""

    embedding: int
    layers: int
    final_norm: int
    output_head: int
    halting_head: int
    num_passes: int

    @property
    def held(self) -> int:
        return self.embedding + self.layers + self.final_norm + self.output_head + self.halting_head

    @property
    def unrolled(self) -> int:
        return self.held + (self.num_passes - 1) * self.layers


def count_parameters(shape: ModelShape, plan: RecursionPlan) -> ParameterCount:
    """The parameters of a model of this shape under this plan (buffers, such as initial states, are not counted)."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    norm = hidden * (2 if shape.norm_bias else 1)
    fc1_rows = ffn * (2 if shape.gated_linear_unit else 1)
    qkv_rows = shape.query_size + shape.key_value_size
    layer = hidden * qkv_rows + shape.query_size * hidden + hidden * fc1_rows + ffn * hidden + 2 * norm
    if shape.linear_bias:
        layer += qkv_rows + hidden + fc1_rows + hidden
    elif shape.qkv_bias:
        layer += qkv_rows
    if shape.qk_norm:
        layer += 2 * shape.kv_channels * (2 if shape.norm_bias else 1)
    return ParameterCount(
        embedding=(shape.vocab_size + shape.learned_positions) * hidden,
        layers=shape.num_layers * layer,
        final_norm=norm,
        output_head=0 if shape.tied_embeddings else shape.vocab_size * hidden,
        halting_head=hidden + 1 if plan.has_halting else 0,
        num_passes=plan.num_passes,
    )
