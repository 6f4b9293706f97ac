"""Measures of whether a recursion uses its depth, on detached output states.

Each is a (sum, count) pair over the tokens in the loss mask, so that micro-batches and ranks average properly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """(sum over the mask, size of the mask) as a tensor of two."""
    return torch.stack([(values.float() * mask).sum(), mask.sum()])


def relative_change(before_SBH: Tensor, after_SBH: Tensor, mask_SB: Tensor, shard_group: ProcessGroup | None) -> Tensor:
    """Mean over tokens of ``|after - before| / |after|``. ``shard_group``: ranks that hold other tokens (or None)."""
    after = after_SBH.float()
    ratio_SB = (after - before_SBH.float()).norm(dim=-1) / after.norm(dim=-1).clamp(min=1e-12)
    return _all_reduce(masked(ratio_SB, mask_SB), shard_group)


def turn(read_SBH: Tensor, result_SBH: Tensor, mask_SB: Tensor, shard_group: ProcessGroup | None) -> Tensor:
    """Mean distance between the directions of two states of a token: 0 for the same, sqrt(2) for a right angle."""
    before, after = (torch.nn.functional.normalize(state.float(), dim=-1) for state in (read_SBH, result_SBH))
    return _all_reduce(masked((after - before).norm(dim=-1), mask_SB), shard_group)


def token_cosine(state_SBH: Tensor, mask_SB: Tensor, shard_group: ProcessGroup | None) -> Tensor:
    """Mean cosine between the states of two different tokens of a sequence, 0 where it is negative.

    With unit vectors u_i, ``sum_{i != j} u_i u_j = |sum_i u_i|^2 - S``; near 1, all tokens look alike (collapse;
    Geiping et al. 2025, "Bad Run 1").
    """
    unit_SBH = torch.nn.functional.normalize(state_SBH.float(), dim=-1) * mask_SB[..., None]
    total_BH, count_B = _all_reduce(unit_SBH.sum(0), shard_group), _all_reduce(mask_SB.sum(0), shard_group)
    pairs_B = count_B * (count_B - 1)
    cosine_B = ((total_BH.square().sum(-1) - count_B) / pairs_B.clamp(min=1.0)).clamp(min=0.0)
    return masked(cosine_B, (pairs_B > 0).float())


def _all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor
