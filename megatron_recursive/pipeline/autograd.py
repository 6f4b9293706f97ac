"""Autograd functions that join graphs which the pipeline cuts at every trip."""

from __future__ import annotations

from collections.abc import Sequence
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

    For a prelude in a first trip that does not record its reading. Its backward takes that trip's slot, which is empty,
    and does not make that of a later trip longer.
    """

    @staticmethod
    def forward(ctx: Any, sent: Tensor, graph: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return sent.view_as(sent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return grad, gathered, None


class JoinReadings(torch.autograd.Function):
    """Identity on ``hidden``; its backward also goes into what heads made of it, by what is in the leaves' ``.grad``.

    What the heads say after a block enters the loss that is put together behind the last one, as leaves. The backward
    of that loss runs first; the block's own begins when the gradient of the hidden tensor, which was sent on, is back.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: Sequence[Tensor], *graphs: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered = [leaf.grad for leaf in ctx.leaves]
        ctx.leaves = None
        return grad, None, *gathered
