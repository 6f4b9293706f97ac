"""Distillation from a teacher's logits (Hinton et al. 2015), over the vocabulary's tensor-parallel shards.

Megatron 0.19 has two mechanisms, and neither goes with a recursion. ModelOpt's needs that package and makes teacher and
student one model. ``megatron.training.distillation`` (``--logits-load-dir``) hooks the output layer, which runs once a
block here, reads fp32 logits after the cross-entropy has overwritten them, has no temperature, and finds what a teacher
said by iteration and rank, so that other micro-batches or documents mismatch unseen. Its objective, and its bucket for
what is not among the top k, are the ones here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce


@dataclass(frozen=True)
class TopTokens:
    """A teacher's most likely tokens, its softmax at the temperature: token ids [..., K], and log-probabilities
    [..., K + 1], the last that of all other tokens together."""

    ids: Tensor
    log_probs: Tensor


# Of token ids and positions [B, S] and where their documents lie (None: each sample is one): this rank's shard
# [B, S, V / tp] of logits, minus infinity where the teacher has no token, or what was kept of them.
Teacher = Callable[[Tensor, Tensor, Any], Tensor | TopTokens]


@dataclass(frozen=True)
class Distillation:
    """Objective: ``(1 - weight) * (the language-model loss) + weight * temperature^2 * KL(teacher || student)``."""

    teacher: Teacher
    weight: float
    temperature: float

    def loss(self, group: ProcessGroup, inputs: tuple[Any, ...], logits_SBV: Tensor) -> Tensor:
        """Per token, [B, S]: ``temperature^2 * KL``. Call it before the cross-entropy, which overwrites logits."""
        with torch.no_grad():
            said = self.teacher(*inputs)
        loss_BS: Tensor = _Divergence.apply(logits_SBV.transpose(0, 1), said, self.temperature, group)
        return loss_BS


class _Divergence(torch.autograd.Function):
    """``T^2 KL(q || p)``, p and q at temperature T; the gradient is ``T (p - q)``, the one tensor that is kept.

    Of :class:`TopTokens` KL is that of distributions over K tokens and "another one". That is the KL of q with the
    rest's probability spread as the student spreads its own, and has the gradient of that q as a constant.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, said: Tensor | TopTokens, temperature: float, group: ProcessGroup) -> Tensor:
        log_p = vocab_parallel_log_softmax(logits.float() / temperature, group)
        if isinstance(said, TopTokens):
            log_q = _spread(said, log_p, group)
        else:
            log_q = vocab_parallel_log_softmax(said.float() / temperature, group)
        q = log_q.exp()
        divergence = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0).sum(-1)
        all_reduce(divergence, group=group)
        ctx.save_for_backward(log_p.exp_().sub_(q))
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return divergence * temperature**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (ctx.temperature * gradient)[..., None]).to(ctx.dtype), None, None, None


def vocab_parallel_log_softmax(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Of a shard [..., V / tp], over all shards."""
    largest = logits.amax(-1, keepdim=True)
    all_reduce(largest, ReduceOp.MAX, group=group)
    shifted = logits - largest
    total = shifted.exp().sum(-1, keepdim=True)
    all_reduce(total, group=group)
    return shifted.sub_(total.log_())


def _spread(said: TopTokens, log_p: Tensor, group: ProcessGroup) -> Tensor:
    """The teacher's log-probabilities over this rank's shard, those that were not kept in the student's proportions."""
    size = log_p.shape[-1]
    ids = said.ids - group.rank() * size
    ids = torch.where((ids >= 0) & (ids < size), ids, size)  # tokens of other shards into a column that is dropped
    kept = torch.zeros_like(F.pad(log_p, (0, 1)), dtype=torch.bool).scatter_(-1, ids, True)[..., :size]
    rest = log_p.exp().masked_fill_(kept, 0.0).sum(-1, keepdim=True)
    all_reduce(rest, group=group)
    spread = log_p - rest.clamp(min=torch.finfo(rest.dtype).tiny).log() + said.log_probs[..., -1:]
    return F.pad(spread, (0, 1)).scatter_(-1, ids, said.log_probs[..., :-1].to(spread))[..., :size]
