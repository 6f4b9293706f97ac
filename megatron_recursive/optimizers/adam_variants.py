"""AdamATan2 and ELLISAdam in plain torch.

Both take ``atan2(m, sqrt(v))`` where Adam has ``m / (sqrt(v) + eps)`` (arXiv 2407.05872): without epsilon, and a weight
moves by at most pi / 2 times the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class AdamATan2(torch.optim.Optimizer):
    """AdamW with ``atan2``, as TRM and HRM train.

    ``p <- p (1 - lr wd) - lr atan2(m / (1 - b1^t), sqrt(v / (1 - b2^t)))``, with m, v and t under Adam's names.

    Args:
        params, lr, betas, weight_decay: as Adam's; eps: read by ELLISAdam alone.
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
            if not self.state[p] and not (skip_non_grad_params and p.grad is None):
                starts = p.grad.clone() if self.starts_at_gradient and p.grad is not None else torch.zeros_like(p)
                self.state[p].update(step=torch.tensor(0.0), exp_avg=starts, exp_avg_sq=starts.square())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            self._init_group(group)
            weights, (beta1, beta2) = [p for p in group["params"] if p.grad is not None], group["betas"]
            for p in weights:
                self.state[p]["step"] += 1
                self.state[p]["exp_avg"].lerp_(p.grad, 1 - beta1)
                self.state[p]["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
            for p, clip in zip(weights, self._clips(group, weights), strict=True):
                m, v, t = (self.state[p][name] for name in ("exp_avg", "exp_avg_sq", "step"))
                unbiased1, unbiased2 = 1 - beta1 ** float(t), 1 - beta2 ** float(t)
                p.mul_(1 - self._decay(group))
                p.sub_(self._turn(m, (v / unbiased2).sqrt(), unbiased1) * (group["lr"] / clip))

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["lr"] * group["weight_decay"])

    def _turn(self, m: Tensor, root: Tensor, unbiased: float) -> Tensor:
        return torch.atan2(m / unbiased, root)

    def _clips(self, group: dict[str, Any], weights: list[Tensor]) -> list[Any]:
        """What each weight's learning rate is divided by."""
        return [1.0] * len(weights)


class ELLISAdam(AdamATan2):
    """Huginn's and the retrofit's.

    ``p <- p (1 - lr / peak wd) - lr / ((1 - b1^t) max(1, r)) atan2(m, sqrt(v / (1 - b2^t)))``

    ``r`` is the root mean square of ``g / sqrt(v)`` over a whole weight, all its tensor-parallel shards together; ``v``
    is at least ``eps^2``. The moments start at the first gradient and its square, and their bias is corrected all the
    same. Weight decay does not scale with the peak of the learning rate (``max_lr`` of a group): it is a share a step.
    """

    starts_at_gradient = True

    def _decay(self, group: dict[str, Any]) -> float:
        peak = group.get("max_lr", group["lr"])
        return float(group["lr"] / peak * group["weight_decay"]) if peak else 0.0

    def _turn(self, m: Tensor, root: Tensor, unbiased: float) -> Tensor:
        return torch.atan2(m, root) / unbiased

    def _clips(self, group: dict[str, Any], weights: list[Tensor]) -> list[Any]:
        if not weights:
            return []
        floors = [self.state[p]["exp_avg_sq"].clamp_(min=group["eps"] ** 2) for p in weights]
        ratios = [(p.grad.square() / v).mean() for p, v in zip(weights, floors, strict=True)]  # type: ignore[union-attr]
        means = torch.stack(ratios)
        spread = [i for i, p in enumerate(weights) if getattr(p, "tensor_model_parallel", False)]
        if self.tp_group is not None and self.tp_group.size() > 1 and spread:
            sums = means[spread]  # shards are of equal size
            torch.distributed.all_reduce(sums, group=self.tp_group)
            means[spread] = sums / self.tp_group.size()
        return list(means.sqrt().clamp(min=1.0))
