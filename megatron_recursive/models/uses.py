"""Every use of a shared weight is backpropagated in a graph of its own.

A weight is used once a pass. Where one graph holds all of its uses, autograd adds their gradients in the weight's own
dtype, and Megatron's DDP adds only the sum to ``main_grad``: in bf16, 1 + 20 * 2^-9 is 1. Here the backward of each use
ends at the weight, so that DDP adds it in fp32 by itself, in one process as in the ring. It is Megatron's checkpoint
function without the replay: the same operations in the same order, and nothing more is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


class Uses:
    """The uses of a model's weights whose backward is still to come.

    Attributes:
        open: how many, by the name of the part of the model that is used as a whole.
        current: the part that is used now, in a forward, a backward, or a replay within one.
    """

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()
        self.current: str | None = None

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.current = self.current, part
        try:
            yield
        finally:
            self.current = before

    def apart(self, part: str, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """``function(*inputs)``, which uses the weights of ``part`` once each, in a graph of its own."""
        if not torch.is_grad_enabled():
            with self.within(part):
                return function(*inputs)
        # The result needs a gradient for the weights' sake, also where no input has one (token ids, a detached state).
        anchor = torch.empty(0, device=next(x.device for x in inputs if x is not None), requires_grad=True)
        return _Apart.apply(self, part, function, anchor, *inputs)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, uses: Uses, part: str, function: Callable[..., Tensor], anchor: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        ctx.leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad(), uses.within(part):
            output = function(*ctx.leaves)
        # The edge and not the tensor: a pipeline frees the data of what it has sent, and only this would hold it.
        ctx.edge = get_gradient_edge(output) if output.requires_grad else None  # weights may be frozen
        ctx.uses, ctx.part = uses, part
        uses.open[part] += 1
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.uses.open[ctx.part] -= 1  # before, since DDP asks as soon as a weight has its gradient
        if ctx.edge is not None:
            with ctx.uses.within(ctx.part):
                torch.autograd.backward([ctx.edge], [grad])
        gradients = [None if leaf is None else leaf.grad for leaf in ctx.leaves]
        ctx.edge = ctx.leaves = None
        return None, None, None, None, *gradients
