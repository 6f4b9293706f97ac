"""How many parameters a recursive model holds, and how many a plain model of its unrolled depth would hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.added_parameters import added_parameters


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a dense GPT, in the names of Megatron's flags; ``vocab_size`` is the padded one.

    ``norms_per_layer`` counts those over the hidden size; ``qk_norm_full`` norms queries and keys over all heads.
    """

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
    qk_norm_full: bool = False
    norm_bias: bool = True
    norms_per_layer: int = 2
    attention_gate: bool = False
    norm_weight: bool = True

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        return 2 * self.num_query_groups * self.kv_channels


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by group (``added``: by recursion).

    ``held`` is what the model stores; ``unrolled`` counts a layer once per pass through it.
    """

    embedding: int
    layers: int
    final_norm: int
    output_head: int
    added: int
    unrolled_layers: int

    @property
    def held(self) -> int:
        return self.embedding + self.layers + self.final_norm + self.output_head + self.added

    @property
    def unrolled(self) -> int:
        return self.held - self.layers + self.unrolled_layers


def padded_rows(vocabulary: int, tensor_parallel: int = 1) -> int:
    """Of an embedding, as Megatron pads by default; of an import, so that any power of two up to 128 divides them."""
    return -(-vocabulary // (128 * tensor_parallel)) * 128 * tensor_parallel


def count_parameters(shape: ModelShape, plan: RecursionPlan) -> ParameterCount:
    """The parameters of a model of this shape under this plan (buffers, such as initial states, are not counted)."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    norm = hidden * (shape.norm_weight + shape.norm_bias)
    fc1_rows = ffn * (2 if shape.gated_linear_unit else 1)
    qkv_rows = shape.query_size * (2 if shape.attention_gate else 1) + shape.key_value_size
    layer = hidden * qkv_rows + shape.query_size * hidden + hidden * fc1_rows + ffn * hidden
    layer += shape.norms_per_layer * norm
    if shape.linear_bias:
        layer += qkv_rows + hidden + fc1_rows + hidden
    elif shape.qkv_bias:
        layer += qkv_rows
    if shape.qk_norm:
        widths = shape.query_size + shape.key_value_size // 2 if shape.qk_norm_full else 2 * shape.kv_channels
        layer += widths * (2 if shape.norm_bias else 1)
    return ParameterCount(
        embedding=(shape.vocab_size + shape.learned_positions) * hidden,
        layers=shape.num_layers * layer,
        final_norm=norm,
        output_head=0 if shape.tied_embeddings else shape.vocab_size * hidden,
        added=sum(each.size(hidden) for each in added_parameters(plan) if each.trained),
        unrolled_layers=plan.unrolled_layers(shape.num_layers) * layer,
    )


def parameters_by_stack(shape: ModelShape, plan: RecursionPlan) -> dict[str, tuple[int, int]]:
    """The parameters that each stack of layers holds, and what they would be with a layer for every pass through it."""
    layer = count_parameters(shape, plan).layers // shape.num_layers
    held = {name: len(layers) * layer for name, layers in plan.layers_of(shape.num_layers).items()}
    return {name: (size, size * sum(p.stack == name for p in plan.passes)) for name, size in held.items()}


def tensor_parallel_parameters(
    shape: ModelShape, plan: RecursionPlan, tensor_parallel: int, layers_per_stage: Sequence[int]
) -> list[float]:
    """The parameters that a rank of each pipeline stage holds.

    Norms, biases behind row-parallel layers, position embeddings and what recursion adds are held by every
    tensor-parallel rank. A tied embedding is held on the first and on the last stage.
    """
    counted = count_parameters(shape, plan)
    added = {place: sum(each.size(shape.hidden_size) for each in added_parameters(plan)
                        if each.trained and each.stage == place) for place in ("first", "last")}  # fmt: skip
    norm = counted.final_norm
    replicated = shape.norms_per_layer * norm + (2 * shape.hidden_size if shape.linear_bias else 0)
    if shape.qk_norm and not shape.qk_norm_full:
        replicated += 2 * shape.kv_channels * (2 if shape.norm_bias else 1)
    layer = counted.layers // shape.num_layers
    words, positions = shape.vocab_size * shape.hidden_size, shape.learned_positions * shape.hidden_size
    stages = []
    for stage, layers in enumerate(layers_per_stage):
        is_first, is_last = stage == 0, stage == len(layers_per_stage) - 1
        size = layers * ((layer - replicated) / tensor_parallel + replicated)
        if is_first:
            size += words / tensor_parallel + positions + added["first"]
        if is_last:
            own_head = not shape.tied_embeddings or not is_first
            size += norm + added["last"] + (words / tensor_parallel if own_head else 0)
        stages.append(size)
    return stages
