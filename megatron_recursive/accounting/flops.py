"""FLOPs per token of a training step: forward through every pass, backward only where gradient flows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from megatron_recursive.accounting.params import ModelShape
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.added_parameters import combining_flops


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations per token of one training step (a multiply-add counts 2).

    A backward pass costs twice its forward pass, and through frozen weights, which have no gradient, once;
    recomputation is not counted, as in Megatron. ``graded_forward``: of the passes with gradient. ``teacher``: the
    forward of one that a model is distilled from.
    """

    passes_forward: float
    graded_forward: float
    passes_backward: float
    head_forward: float
    head_backward: float
    teacher: float = 0.0

    @property
    def forward(self) -> float:
        return self.passes_forward + self.head_forward + self.teacher

    @property
    def backward(self) -> float:
        return self.passes_backward + self.head_backward

    @property
    def total(self) -> float:
        return self.forward + self.backward

    @property
    def grad_free_passes(self) -> float:
        """Of passes without gradient: 2 N for their N parameters, and their attention."""
        return self.passes_forward - self.graded_forward

    @property
    def graded_passes(self) -> float:
        """Of passes with gradient: 6 N, and their attention."""
        return self.graded_forward + self.passes_backward


def layer_forward_flops(shape: ModelShape, *, causal: bool = True) -> float:
    """Forward FLOPs per token of one layer. ``causal`` counts the half of the score matrix that is used."""
    hidden = shape.hidden_size
    projections = 2 * hidden * ((3 if shape.attention_gate else 2) * shape.query_size + shape.key_value_size)
    attention = 2 * 2 * shape.seq_length * shape.query_size * (0.5 if causal else 1.0)
    mlp = 2 * hidden * shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2)
    return projections + attention + mlp


def vocabulary_flops(shape: ModelShape) -> float:
    """Of one projection to the vocabulary."""
    return 2.0 * shape.hidden_size * shape.vocab_size


def inference_flops(shape: ModelShape, plan: RecursionPlan) -> float:
    """Per token of a text that is read: all passes forward, and one projection to the vocabulary."""
    return flops_per_token(shape, plan).passes_forward + vocabulary_flops(shape)


def flops_per_token(
    shape: ModelShape, plan: RecursionPlan, *, causal: bool = True, frozen: bool = False
) -> FlopsPerToken:
    """FLOPs per token of a training step under a plan, at the shape's sequence length.

    The vocabulary projection runs after every block whose output is supervised or teaches the halting head;
    it has a backward pass where the language-model loss is taken. ``frozen``: what is trained are adapters beside the
    weights (LoRA), which are not counted.
    """
    layer = layer_forward_flops(shape, causal=causal)
    weights = layer_forward_flops(replace(shape, seq_length=0))
    layers = {p: count for p, (count,) in zip(plan.passes, plan.layers_by_pass([shape.num_layers]), strict=True)}
    vocabulary = vocabulary_flops(shape)
    projected = sum(map(plan.is_projected, plan.passes))
    supervised = sum(p.supervised_weight > 0 for p in plan.passes)
    cost = {p: count * layer + combining_flops(p, shape.hidden_size) for p, count in layers.items()}
    graded = sum(cost[p] for p in plan.grad_passes)
    of_weights = graded - sum(layers[p] * (layer - weights) for p in plan.grad_passes)
    return FlopsPerToken(
        passes_forward=sum(cost.values()),
        graded_forward=graded,
        passes_backward=2 * graded - frozen * of_weights,
        head_forward=projected * vocabulary,
        head_backward=(1 if frozen else 2) * supervised * vocabulary,
    )


def mean_flops_per_token(
    shape: ModelShape, plans: Mapping[RecursionPlan, float], teacher: float = 0.0, *, frozen: bool = False
) -> FlopsPerToken:
    """Over training steps of several plans, with how many there are of each; ``teacher``: FLOPs of its forward."""
    counted = [(flops_per_token(shape, plan, frozen=frozen), number) for plan, number in plans.items()]
    steps = sum(plans.values())
    means = {f.name: sum(getattr(x, f.name) * number for x, number in counted) / steps for f in fields(FlopsPerToken)}
    return FlopsPerToken(**{**means, "teacher": teacher})
