"""AdamATan2 and ELLISAdam in plain torch.

Both take ``atan2(m, sqrt(v))`` where Adam has ``m / (sqrt(v) + eps)`` (arXiv 2407.05872): without epsilon, and a weight
moves by at most pi / 2 times the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class _TwoMoments(torch.optim.Optimizer):
    """Moments ``exp_avg`` (m) and ``exp_avg_sq`` (v) for each weight, and the number of its steps, under Adam's names.

    Args:
        params: weights, or groups of them with settings of their own.
        lr, betas, weight_decay: as Adam's.
        eps: read by ELLISAdam.
        tp_group: the ranks over which weights marked ``tensor_model_parallel`` are spread; None: nothing is.
    """

    starts_at_gradient = False

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.0, tp_group: ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.tp_group = tp_group

    @torch.no_grad()
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Megatron calls it before it reads a checkpoint, when no weight has a gradient yet."""
        for p in group["params"]:
            if self.state[p] or (skip_non_grad_params and p.grad is None):
                continue
            starts = self.starts_at_gradient and p.grad is not None
            m, v = (p.grad.clone(), p.grad.square()) if starts else (torch.zeros_like(p), torch.zeros_like(p))
            self.state[p].update(step=torch.tensor(0.0), exp_avg=m, exp_avg_sq=v)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            self._init_group(group)
            weights = [p for p in group["params"] if p.grad is not None]
            for p in weights:
                state, (beta1, beta2) = self.state[p], group["betas"]
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
            self._move(group, weights)

    def _move(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        raise NotImplementedError

    def _turn(self, p: Tensor, group: dict[str, Any], *, correct_first: bool) -> Tensor:
        """``atan2`` of the moments; v without its bias, and m too if asked."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        steps = float(state["step"])
        m = state["exp_avg"] / (1 - beta1**steps) if correct_first else state["exp_avg"]
        return torch.atan2(m, state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**steps))


class AdamATan2(_TwoMoments):
    """AdamW with ``atan2``, as TRM and HRM train.

    ``p <- p (1 - lr wd) - lr atan2(m / (1 - b1^t), sqrt(v / (1 - b2^t)))``
    """

    def _move(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for p in weights:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(self._turn(p, group, correct_first=True), alpha=group["lr"])


class ELLISAdam(_TwoMoments):
    """Huginn's and the retrofit's.

    ``p <- p (1 - lr / peak wd) - lr / ((1 - b1^t) max(1, r)) atan2(m, sqrt(v / (1 - b2^t)))``

    ``r`` is the root mean square of ``g / sqrt(v)`` over a whole weight, all its tensor-parallel shards together; ``v``
    is at least ``eps^2``. The moments start at the first gradient and its square, and their bias is corrected all the
    same. Weight decay does not scale with the peak of the learning rate (``max_lr`` of a group): it is a share a step.
    """

    starts_at_gradient = True

    def _move(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        rate, peak = group["lr"], group.get("max_lr", group["lr"])
        decay = rate / peak * group["weight_decay"] if peak else 0.0
        for p, ratio in zip(weights, self._ratios(group, weights), strict=True):
            p.mul_(1 - decay)
            step = rate / ((1 - group["betas"][0] ** float(self.state[p]["step"])) * ratio.clamp(min=1.0))
            p.sub_(self._turn(p, group, correct_first=False) * step)

    def _ratios(self, group: dict[str, Any], weights: list[Tensor]) -> list[Tensor]:
        """``r`` of each weight, with one message for all that are spread."""
        means = []
        for p in weights:
            v = self.state[p]["exp_avg_sq"].clamp_(min=group["eps"] ** 2)
            means.append((p.grad.square() / v).mean())  # type: ignore[union-attr]
        spread = [i for i, p in enumerate(weights) if getattr(p, "tensor_model_parallel", False)]
        if self.tp_group is not None and self.tp_group.size() > 1 and spread:
            sums = torch.stack([means[i] for i in spread])  # shards are of equal size
            torch.distributed.all_reduce(sums, group=self.tp_group)
            for i, total in zip(spread, sums / self.tp_group.size(), strict=True):
                means[i] = total
        return [mean.sqrt() for mean in means]
