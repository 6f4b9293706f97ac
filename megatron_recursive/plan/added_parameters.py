"""What recursion adds in tensors, each declared once.

Model, checkpoints, accounting, mapping tables, imports and the Hugging Face model read the declaration; what a tensor
does stands where its word of the plan is read. This file ships inside an export (hf/model/__init__.py), so that it
imports the standard library alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .recursion_plan import RecursionPlan


@dataclass(frozen=True)
class AddedParameter:
    """A tensor that a plan asks for beside the layers. Every tensor-parallel rank holds it whole.

    Attributes:
        key: its name in Megatron's model and in checkpoints: a module of the model and its weight, or a buffer.
        exported: its name in an export.
        shape: in an export: sizes in the letters of the mapping tables (h is the hidden size), or numbers. Megatron's
            leaves out a leading 1: optimizers which treat matrices apart shall leave a vector alone.
        stage: the pipeline stage that holds it, ``first`` or ``last``.
        start: value of a fresh one, or the name of the knob that has it; ``trunc-normal`` is a seeded vector of std 1.
        trained: False for a buffer, which belongs to the function and is not counted as a parameter.
        in_fp32: computes in fp32, and keeps its dtype where others are cast or quantised.
    """

    key: str
    exported: str
    shape: str
    stage: str
    start: float | str = 0.0
    trained: bool = True
    in_fp32: bool = False

    @property
    def module(self) -> str:
        """The attribute of Megatron's model that holds it; a buffer has no module."""
        return self.key.rpartition(".")[0]

    def sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Megatron's shape."""
        letters = {"h": hidden_size, "2h": 2 * hidden_size}
        exported = tuple(letters.get(each) or int(each) for each in self.shape.split())
        return exported[1:] if len(exported) > 1 and exported[0] == 1 else exported

    def size(self, hidden_size: int) -> int:
        return math.prod(self.sizes(hidden_size))


HALTING_HEAD = (
    AddedParameter("halting_head.weight", "halting_head.weight", "1 h", "last", in_fp32=True),
    AddedParameter("halting_head.bias", "halting_head.bias", "1", "last", "halt_bias", in_fp32=True),
)
EXIT_GATE = (
    AddedParameter("exit_gate.weight", "exit_gate.weight", "1 h", "last", in_fp32=True),
    AddedParameter("exit_gate.bias", "exit_gate.bias", "1", "last", in_fp32=True),
)
INITIAL_STATES = (
    AddedParameter("initial_output", "model.initial_output", "h", "first", "trunc-normal", trained=False),
    AddedParameter("initial_latent", "model.initial_latent", "h", "first", "trunc-normal", trained=False),
)
EVERY = (*HALTING_HEAD, *EXIT_GATE, *INITIAL_STATES)


def added_parameters(plan: RecursionPlan) -> tuple[AddedParameter, ...]:
    """What a plan's words ask for, in the order of :data:`EVERY`."""
    asked: tuple[AddedParameter, ...] = ()
    if plan.has_halting:
        asked += HALTING_HEAD
    if plan.exit_gate:
        asked += EXIT_GATE
    if not plan.is_plain and plan.state_init == "trunc-normal":
        asked += INITIAL_STATES
    return asked


def start_of(parameter: AddedParameter, knobs: object) -> float | str:
    """Where a fresh one starts; ``knobs`` has those that a start may name."""
    start = parameter.start
    return float(getattr(knobs, start)) if isinstance(start, str) and hasattr(knobs, start) else start
