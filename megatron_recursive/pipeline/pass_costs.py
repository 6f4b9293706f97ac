"""What the trips of a plan cost on each pipeline stage, priced by the FLOPs of ``accounting``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_recursive.accounting import ModelShape
from megatron_recursive.accounting.flops import layer_forward_flops, vocabulary_flops
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.added_parameters import combining_flops
from megatron_recursive.plan.trips import trips_of

Work = tuple[float, ...]  # by stage


@dataclass(frozen=True)
class PassCosts:
    """What each trip costs on each stage, in forwards of all layers on one rank: comparable over numbers of stages.

    Attributes:
        forward, backward: ``[trip][stage]``.
        grad: by trip, whether it is recorded (and its activations live) until its backward.
        passes: by trip, the numbers of its passes, from 1.
    """

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    grad: tuple[bool, ...]
    passes: tuple[tuple[int, ...], ...] = ()

    @property
    def stages(self) -> int:
        return len(self.forward[0])

    def busy(self, micro_batches: int) -> list[float]:
        """Work of each stage in a step."""
        columns = zip(zip(*self.forward, strict=True), zip(*self.backward, strict=True), strict=True)
        return [micro_batches * (sum(forward) + sum(backward)) for forward, backward in columns]


def equal_costs(
    plan: RecursionPlan, stages: int, backward_cost: float = 2.0, layers_per_stage: Sequence[int] = ()
) -> PassCosts:
    """Every pass costs 1 forward over all stages, and ``backward_cost`` backward where it carries gradient.

    Which passes share a trip follows from the layers of each stage; none do if left out.
    """
    forward = [(1 / stages,) * stages] * plan.num_passes
    backward = [(backward_cost / stages if p.grad else 0.0,) * stages for p in plan.passes]
    return _by_trip(plan, layers_per_stage, forward, backward)


def price_passes(
    plan: RecursionPlan, shape: ModelShape, layers_per_stage: Sequence[int], backward_cost: float = 2.0
) -> PassCosts:
    """FLOPs per token of each trip on each stage, as ``accounting`` counts them, over those of all layers' forward.

    The vocabulary projection stands on the last stage, at block ends that are supervised or teach a head; backward it
    costs where the language-model loss is taken, and once more where its forward is replayed (before the last block).
    The embedding is a lookup of no FLOPs.
    """
    last = len(layers_per_stage) - 1
    unit = sum(layers_per_stage) * layer_forward_flops(shape)
    layer = layer_forward_flops(shape) / unit
    head = vocabulary_flops(shape) / unit
    forward, backward = [], []
    for p, counts in zip(plan.passes, plan.layers_by_pass(layers_per_stage), strict=True):
        layers = [count * layer for count in counts]
        layers[0] += combining_flops(p, shape.hidden_size) / unit
        projected, supervised = plan.is_projected(p), p.supervised_weight > 0
        forward.append(tuple(c + head * (projected and stage == last) for stage, c in enumerate(layers)))
        backward.append(tuple(
            backward_cost * c * p.grad + (2 + plan.is_replayed(p)) * head * (supervised and stage == last)
            for stage, c in enumerate(layers)
        ))  # fmt: skip
    return _by_trip(plan, layers_per_stage, forward, backward)


def _by_trip(
    plan: RecursionPlan, layers_per_stage: Sequence[int], forward: Sequence[Work], backward: Sequence[Work]
) -> PassCosts:
    """The costs of passes, added up over those that share a trip."""
    trips = trips_of(plan, layers_per_stage)

    def added(costs: Sequence[Work]) -> tuple[Work, ...]:
        return tuple(tuple(map(sum, zip(*(costs[p.index] for p in trip.passes), strict=True))) for trip in trips)

    passes = tuple(tuple(p.index + 1 for p in trip.passes) for trip in trips)
    return PassCosts(added(forward), added(backward), tuple(trip.grad for trip in trips), passes)
