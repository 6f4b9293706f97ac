"""Autograd functions that join graphs which the pipeline cuts at every trip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class JoinLeafGradient(torch.autograd.Function):
    """Identity on ``graph``; its backward adds what later passes left in ``leaf.grad``.

    The embedding is read by many passes, whose backward passes run one by one, last pass first. They read a detached
    leaf, which gathers their gradients; only the first pass with gradient, whose backward runs last, reads the real
    tensor and hands everything on, so that the embedding is backpropagated once.
    """

    @staticmethod
    def forward(ctx: Any, graph: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf  # not save_for_backward: its .grad at the time of the backward is what counts
        return graph.view_as(graph)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return (grad if gathered is None else grad + gathered), None


class CarryGraph(torch.autograd.Function):
    """Identity on ``sent``; its backward also backpropagates through ``graph`` what later trips left in ``leaf.grad``.

    For a prelude in a first trip that does not record its reading: so its backward stands in that trip's own slot,
    where it keeps the last stage's coda company, and not in that of a later trip.
    """

    @staticmethod
    def forward(ctx: Any, sent: Tensor, graph: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return sent.view_as(sent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return grad, gathered, None


class InjectLoss(torch.autograd.Function):
    """Identity on ``hidden``; its backward also backpropagates ``scale() * loss`` (as Megatron's MTPLossAutoScaler).

    A loss at a block boundary belongs to a tensor that is sent on, whose backward starts with the gradient that comes
    back. The scale is asked for at that time, because a loss scaler may have changed it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: Callable[[], float | Tensor]) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.scale = scale
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss) * ctx.scale(), None
