"""The expected loss over the loops at which an exit gate leaves (Zhu et al. 2025, Ouro)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def log_exit_probabilities(gate_logits: Sequence[Tensor], like: Tensor) -> Tensor:
    """``log p_t`` of leaving after each of T loops, [T, ...], fp32, from the gate's logits after the first T - 1.

    A loop that is reached is left with ``lambda_t = sigmoid(logit)``; the last takes what remains.
    ``like`` has the shape of one loop's.
    """
    stays, found = torch.zeros_like(like, dtype=torch.float), []
    for logits in gate_logits:
        found.append(stays + F.logsigmoid(logits.float()))
        stays = stays + F.logsigmoid(-logits.float())
    return torch.stack([*found, stays])


def expected_loss(
    losses: Sequence[Tensor], gate_logits: Sequence[Tensor], entropy_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token ``sum_t p_t loss_t - weight * H(p)``, and what it is made of, detached.

    The entropy keeps the gate from taking the loop that happens to be best early in training for good.
    """
    losses_T = torch.stack([loss.float() for loss in losses])
    log_p_T = log_exit_probabilities(gate_logits, losses[-1])
    p_T = log_p_T.exp()
    expected, entropy = (p_T * losses_T).sum(0), -(p_T * log_p_T).sum(0)
    mean_loop = sum((number * p for number, p in enumerate(p_T, start=1)), torch.zeros_like(expected))
    facts = {"expected lm loss": expected, "mean exit loop": mean_loop, "exit entropy": entropy}
    return expected - entropy_weight * entropy, {name: value.detach() for name, value in facts.items()}


STEEPNESS, LEAST_GAIN = 50.0, 0.005


def improvement_loss(losses: Sequence[Tensor], gate_logits: Sequence[Tensor]) -> Tensor:
    """Per token, how badly T gates tell whether their loop was worth it: trains a gate alone (Ouro's second stage).

    After a loop t > 1 that lowered the loss by ``gain = max(0, loss_(t-1) - loss_t)``, going on is right with
    ``w = sigmoid(50 (gain - 0.005))``; the sum over those loops of the cross-entropy of ``1 - lambda_t`` to it, over T.
    """
    terms = [torch.zeros_like(losses[0], dtype=torch.float)]  # of one loop there is nothing to tell
    for before, after, logits in zip(losses, losses[1:], gate_logits[1:], strict=False):
        gain = (before.float() - after.float()).detach().clamp(min=0.0)
        leaves = 1.0 - torch.sigmoid(STEEPNESS * (gain - LEAST_GAIN))
        terms.append(F.binary_cross_entropy_with_logits(logits.float(), leaves, reduction="none"))
    return torch.stack(terms).sum(0) / len(losses)
