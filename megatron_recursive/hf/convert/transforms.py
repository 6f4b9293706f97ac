"""How tensors of the two layouts become each other: the many-to-one ones, by name.

Each transform merges the Hugging Face tensors of a table's row into Megatron's tensor, and splits that one back. Both
directions only move numbers, so that they are exact in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture


@dataclass(frozen=True)
class Transform:
    """``merge`` and ``split`` are each other's inverse, but for the padding rows of the vocabulary."""

    name: str
    merge: Callable[[Sequence[Tensor], Architecture], Tensor]
    split: Callable[[Tensor, Architecture], tuple[Tensor, ...]]


def _merge_qkv(parts: Sequence[Tensor], arch: Architecture) -> Tensor:
    """q, k, v (or q, gate, k, v) to Megatron's fused rows: for each query group the heads of each, in this order."""
    groups, rest = arch.num_query_groups, parts[0].shape[1:]
    grouped = [part.view(groups, -1, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _split_qkv(fused: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
    groups, width, rest = arch.num_query_groups, arch.head_dim, fused.shape[1:]
    heads = arch.num_attention_heads // groups * width
    sizes = [*[heads] * (2 if arch.attention_gate else 1), width, width]
    parts = fused.view(groups, sum(sizes), *rest).split(sizes, dim=1)
    return tuple(part.reshape(-1, *rest) for part in parts)


def _pad_vocabulary(parts: Sequence[Tensor], arch: Architecture) -> Tensor:
    (rows,) = parts
    missing = arch.padded_vocab_size - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _gate_first(parts: Sequence[Tensor]) -> list[Tensor]:
    """Gate and q in each other's place."""
    return [parts[1], parts[0], *parts[2:]]


def _no_weights(tensor: Tensor, _: Architecture) -> tuple[Tensor, ...]:
    if not torch.equal(tensor, torch.ones_like(tensor)):
        raise UserError("The checkpoint has --norm-weights ones, but norms with other weights; it cannot be exported.")
    return ()


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads whose neighbours are rotated together, in the order of heads whose halves are."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


SAME = "the same for each"


def same(count: int) -> Transform:
    """What so many Hugging Face tensors share."""
    return Transform(SAME, lambda parts, _: parts[0], lambda tensor, _: (tensor,) * count)


COPY = Transform("copy", lambda parts, _: parts[0], lambda tensor, _: (tensor,))
QKV = Transform("qkv", _merge_qkv, _split_qkv)
GATE_UP = Transform(
    "gate, up", lambda parts, _: torch.cat(list(parts)), lambda tensor, _: tuple(tensor.chunk(2, dim=0))
)
GQKV = Transform("gate, q, k, v in one",  # of equal sizes
                 lambda parts, arch: _merge_qkv(_gate_first(parts[0].chunk(4)), arch),
                 lambda tensor, arch: (torch.cat(_gate_first(_split_qkv(tensor, arch))),))  # fmt: skip
# A norm without weights has some in Megatron, which stay at one.
ONES = Transform("ones", lambda _, arch: torch.ones(arch.hidden_size), _no_weights)
VOCABULARY = Transform("padded vocabulary", _pad_vocabulary, lambda tensor, arch: (tensor[: arch.vocab_size],))
# A matrix of rows of the hidden size is one vector in Megatron where its optimizers shall treat it as a vector.
FLAT = Transform("flat", lambda parts, _: parts[0].reshape(-1),
                 lambda tensor, arch: (tensor.reshape(-1, arch.hidden_size),))  # fmt: skip
