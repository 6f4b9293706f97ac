"""How pipeline stages run a plan: the trips that a micro-batch makes around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_recursive.plan.recursion_plan import DecoderPass, RecursionPlan


@dataclass(frozen=True)
class Trip:
    """One way of a micro-batch from the first stage to the last.

    Attributes:
        index: position among the trips of a step, from 0.
        around: the pass that all stages run, each with its layers; perhaps none.
        before: passes that the first stage runs before it (a prelude).
        behind: passes that the last stage runs behind it (a coda).
    """

    index: int
    around: DecoderPass
    before: tuple[DecoderPass, ...] = ()
    behind: tuple[DecoderPass, ...] = ()

    @property
    def passes(self) -> tuple[DecoderPass, ...]:
        return (*self.before, self.around, *self.behind)

    @property
    def last(self) -> DecoderPass:
        """The pass whose result the last stage sends round to the first."""
        return self.passes[-1]

    @property
    def grad(self) -> bool:
        """Whether any stage records any of it."""
        return any(p.grad for p in self.passes)


def trips_of(plan: RecursionPlan, layers_per_stage: Sequence[int] = ()) -> tuple[Trip, ...]:
    """The trips of a plan over stages that hold these layers; on one stage, or unknown ones, every pass is a trip.

    A pass whose layers one stage holds alone is part of a neighbouring trip where that stage has all that it reads. The
    first stage has the embedding, for a prelude that begins the plan. The last stage has the result of the pass before,
    and no state: it runs a coda behind a pass that replaced what the coda reads, and not behind one that moved it by a
    part.
    """
    if len(layers_per_stage) < 2:
        return tuple(Trip(p.index, p) for p in plan.passes)
    trips: list[Trip] = []
    before: list[DecoderPass] = []
    for p, layers in zip(plan.passes, plan.layers_by_pass(layers_per_stage), strict=True):
        if not trips and (p.target, p.reads) == ("input", ("input",)) and layers[0] == sum(layers):
            before.append(p)
        elif trips and layers[-1] == sum(layers) and _continues(trips[-1].last, p):
            trips[-1] = replace(trips[-1], behind=(*trips[-1].behind, p))
        else:
            trips.append(Trip(len(trips), p, tuple(before)))
            before = []
    return tuple(trips)


def free_trips(grad: Sequence[bool]) -> int:
    """How many trips come before the first that any stage records, which two phases run forward-only at first."""
    return next((trip for trip, recorded in enumerate(grad) if recorded), len(grad))


def _continues(previous: DecoderPass, p: DecoderPass) -> bool:
    """Whether a pass reads the bare result of the one before, and replaces it."""
    alike = (previous.block, previous.grad) == (p.block, p.grad)
    bare = p.reads == (p.target,) == (previous.target,) and previous.replaces_state and p.replaces_state
    return alike and bare and not p.cuts_states
