"""The halting loss: a per-token binary cross-entropy on whether the recursion may stop (after TRM's q_head)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def vocab_parallel_argmax(logits_SBV: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Arg-max over a vocabulary that is sharded over tensor-parallel ranks: the lowest id among equals.

    Args:
        logits_SBV: [S, B, V / tp], this rank's shard.

    Returns:
        [B, S] token ids, the same on every rank.
    """
    best_SB, index_SB = logits_SBV.max(dim=-1)
    world_size, rank = tp_group.size(), tp_group.rank()
    if world_size > 1:
        index_SB = index_SB + rank * logits_SBV.shape[-1]
        all_best = [torch.empty_like(best_SB) for _ in range(world_size)]
        all_index = [torch.empty_like(index_SB) for _ in range(world_size)]
        torch.distributed.all_gather(all_best, best_SB, group=tp_group)
        torch.distributed.all_gather(all_index, index_SB, group=tp_group)
        winner_SB = torch.stack(all_best).argmax(dim=0)
        index_SB = torch.stack(all_index).gather(0, winner_SB[None])[0]
    return index_SB.transpose(0, 1)


def halting_loss(halt_logits_BS: Tensor, should_halt_BS: Tensor) -> Tensor:
    """Per-token binary cross-entropy of the halting logit, in fp32: [B, S]. Mask and mean are the caller's."""
    return F.binary_cross_entropy_with_logits(halt_logits_BS.float(), should_halt_BS.float(), reduction="none")


def steps_until_halt(halt_logits_TBS: Tensor, threshold: float) -> Tensor:
    """Blocks that each token would take: the first with ``sigmoid(logit) >= threshold``, at most all T.

    Args:
        halt_logits_TBS: halting logits after each of the T blocks.

    Returns:
        [B, S], between 1 and T.
    """
    halts = torch.sigmoid(halt_logits_TBS.float()) >= threshold
    halts[-1] = True
    return halts.float().argmax(dim=0).float() + 1.0
