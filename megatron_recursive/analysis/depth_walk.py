"""One walk through a model for several depths: the passes that their plans share run once.

A model is walked by ``begin``, which gives the states of a batch, and ``advance``, which gives those behind further
passes and leaves the ones before as they are. ``output``, ``read``, ``logits`` and ``head`` are of tokens: [N, ...].
A recursive one has ``state``, a state [B, S, H] by its name, and ``reset``: output and latent as they ``began``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from megatron_recursive.plan import DecoderPass, RecursionPlan
from megatron_recursive.plan.recursion_plan import OF_TRAINING

_COMPUTED = [field.name for field in fields(DecoderPass) if field.name not in OF_TRAINING]


class Branch(NamedTuple):
    """A depth: its plan, of which the first ``shared`` passes are the deepest plan's too."""

    depth: int
    plan: RecursionPlan
    shared: int


def branches_of(plan: RecursionPlan, depths: Iterable[int]) -> list[Branch]:
    """In the order in which one walk reaches them. A plain model has one depth, 1."""
    if plan.is_plain:
        return [Branch(1, plan, 1)]
    plans = {depth: plan.with_blocks(depth) for depth in sorted(set(depths))}
    works = {depth: [_work(each, p) for p in each.passes] for depth, each in plans.items()}
    deepest = works[max(works)]
    branches = []
    for depth, work in works.items():
        pairs = enumerate(zip(work, deepest, strict=False))
        shared = next((at for at, (mine, theirs) in pairs if mine != theirs), len(work))
        branches.append(Branch(depth, plans[depth], shared))
    return sorted(branches, key=lambda each: each.shared)


def _work(plan: RecursionPlan, each: DecoderPass) -> tuple[Any, ...]:
    """What a pass computes. A gate moves by what it has learned, whatever the step that it started from."""
    each = each if each.move == "step" else replace(each, step=1.0)
    return (plan.closes(each), *(getattr(each, name) for name in _COMPUTED))


def passes_run(branches: list[Branch]) -> int:
    """By one walk; walks of their own run ``sum(each.plan.num_passes)``."""
    return branches[-1].shared + sum(each.plan.num_passes - each.shared for each in branches)


def walk(model: Any, ids_BS: Tensor, branches: list[Branch]) -> Iterator[tuple[int, Any]]:
    """(depth, states at its end) of every branch."""
    trunk, at, states = max(branches).plan, 0, model.begin(ids_BS)
    for depth, plan, shared in branches:
        states, at = model.advance(states, trunk, at, shared), shared
        yield depth, states if shared == plan.num_passes else model.advance(states, plan, shared, None)


def walker_of(loaded: Any) -> Any:
    """How a model that is opened (``inference.loading``) is walked."""
    model = loaded.model
    if hasattr(model, "megatron"):
        return _Megatron(model)
    return _Exported(model) if hasattr(model.config, "recursion_plan") else _Plain(model)


class _Plain:
    """Any model of transformers: its state are its logits."""

    def __init__(self, model: Any) -> None:
        self.model, self.plan, self.has_own_passes = model, RecursionPlan.plain(), False

    def begin(self, ids_BS: Tensor) -> Any:
        return self.model(input_ids=ids_BS, use_cache=False).logits

    def advance(self, states: Any, plan: RecursionPlan, first: int, stop: int | None) -> Any:
        return states

    def output(self, states: Any) -> Tensor:
        return states.flatten(0, 1)

    def logits(self, output_NH: Tensor) -> Tensor:
        return output_NH


class _Exported:
    """Our model in transformers."""

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.plan = model, model.model, model.config.recursion_plan
        self.has_own_passes = model.config.pass_adapters is not None

    def begin(self, ids_BS: Tensor) -> Any:
        found: dict[str, Any] = {}

        def stay(states: dict[str, Tensor], _: bool, shared: dict[str, Any]) -> list[Tensor]:
            found.update(states=dict(states), shared=shared)
            return []

        self.base(input_ids=ids_BS, use_cache=False, walk=stay)
        return found["states"], found["shared"]

    def advance(self, states: Any, plan: RecursionPlan, first: int, stop: int | None) -> Any:
        values, shared = dict(states[0]), states[1]
        self.base.ensure_passes(plan.num_passes)
        self.base._read_plan(plan)
        self.base._run_plan(values, False, shared, first, stop)
        self.base._read_plan(self.plan)
        return values, shared

    def state(self, states: Any, name: str) -> Tensor:
        return states[0][name]

    def reset(self, states: Any, began: Any) -> Any:
        current = dict.fromkeys(["input", *["output"] * self.plan.starts_at_input], states[0]["input"])
        return began[0] | current, states[1]

    def output(self, states: Any) -> Tensor:
        return states[0]["output"].flatten(0, 1)

    def read(self, output_NH: Tensor) -> Tensor:
        return self.base.read_state(output_NH)

    def logits(self, output_NH: Tensor) -> Tensor:
        return self.model._logits_of_state(output_NH)

    def head(self, read_NH: Tensor) -> Tensor:
        return self.model.halting_logits(read_NH)


class _Megatron:
    """A checkpoint of any layout, in one process."""

    def __init__(self, model: Any) -> None:
        self.model, self.core, self.plan = model, model.megatron, model.megatron.plan
        lora = model.megatron.config.lora
        self.has_own_passes = lora is not None and lora.per_pass

    def begin(self, ids_BS: Tensor) -> Any:
        return self.model._start(ids_BS, None, None)[0]

    def advance(self, states: Any, plan: RecursionPlan, first: int, stop: int | None) -> Any:
        from megatron_recursive.models.recursion_state import run_plan

        states = copy.copy(states)
        states.values = dict(states.values)

        def decode(each: DecoderPass, hidden_SBH: Tensor) -> Tensor:
            return self.core.decode(hidden_SBH, None, stack=each.stack, closes=plan.closes(each), index=each.index)

        for _ in run_plan(plan, states, decode, first, stop):
            pass
        return states

    def state(self, states: Any, name: str) -> Tensor:
        return states.values.get(name, states.values["input"]).transpose(0, 1)  # an output that starts at it

    def reset(self, states: Any, began: Any) -> Any:
        states = copy.copy(states)
        states.values = {**began.values, "input": states.values["input"]}
        return states

    def output(self, states: Any) -> Tensor:
        return states.output.transpose(0, 1).flatten(0, 1)

    def read(self, output_NH: Tensor) -> Tensor:
        return self.core._final_state(output_NH[None], True)[0]

    def logits(self, output_NH: Tensor) -> Tensor:
        return self.model._logits_of_tokens(output_NH)

    def head(self, read_NH: Tensor) -> Tensor:
        return self.model._halting_of_tokens(read_NH)
