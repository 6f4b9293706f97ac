"""What recursion adds in tensors, each declared once.

Model, checkpoints, accounting, mapping tables, imports and the Hugging Face model read the declaration; what a tensor
does stands where its word of the plan is read. This file ships inside an export (hf/model/__init__.py), so that it
imports the standard library alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .recursion_plan import DecoderPass, RecursionPlan

SEED = 20251006  # fixed: where a state starts belongs to the function, not to the run


@dataclass(frozen=True)
class AddedParameter:
    """A tensor that a plan asks for beside the layers. Every tensor-parallel rank holds it whole.

    Attributes:
        key: its name in Megatron's model and in checkpoints: a module of the model and its weight, or a buffer.
        exported: its name in an export.
        shape: in an export: sizes in the letters of the mapping tables (h is the hidden size), or numbers.
        stage: the pipeline stage that holds it, ``first`` or ``last``.
        start: value of a fresh one, or the name of the knob that has it; ``trunc-normal`` is a seeded vector of std 1,
            ``identity`` a matrix with ones on its diagonal, ``identity at the end`` on that of its last columns;
            ``step`` where a gate moves a state by the pass's step.
        trained: False for a buffer, which belongs to the function and is not counted as a parameter.
        is_head: --train-only heads trains it.
        in_fp32: computes in fp32, and keeps its dtype where others are cast or quantised.
        decays: False for a matrix without weight decay.
    """

    key: str
    exported: str
    shape: str
    stage: str
    start: float | str = 0.0
    trained: bool = True
    is_head: bool = False
    in_fp32: bool = False
    decays: bool = True

    @property
    def module(self) -> str:
        """The attribute of Megatron's model that holds it; a buffer has no module."""
        return self.key.rpartition(".")[0]

    @property
    def is_flat(self) -> bool:
        """A matrix that Megatron holds as a vector: optimizers decay, and treat apart, what has two axes."""
        return self.shape.startswith("1 ") or not self.decays

    def exported_sizes(self, hidden_size: int) -> tuple[int, ...]:
        letters = {"h": hidden_size, "2h": 2 * hidden_size, "r": low_rank(hidden_size)}
        return tuple(letters.get(each) or int(each) for each in self.shape.split())

    def sizes(self, hidden_size: int) -> tuple[int, ...]:
        """Megatron's shape."""
        exported = self.exported_sizes(hidden_size)
        return (math.prod(exported),) if self.is_flat else exported

    def size(self, hidden_size: int) -> int:
        return math.prod(self.sizes(hidden_size))


@dataclass(frozen=True)
class Mover:
    """What moves a state in place of a step: a module on the first stage, perhaps without parameters.

    It keeps so many tensors of the size of a hidden state for its backward.
    """

    module: str
    parameters: tuple[AddedParameter, ...]
    kept: int


def low_rank(hidden_size: int) -> int:
    """The rank of a gate's projection, LoopUS's and Mamba's."""
    return -(-hidden_size // 16)


HALTING_HEAD = (
    AddedParameter("halting_head.weight", "halting_head.weight", "1 h", "last", is_head=True, in_fp32=True),
    AddedParameter("halting_head.bias", "halting_head.bias", "1", "last", "halt_bias", is_head=True, in_fp32=True),
)
EXIT_GATE = (
    AddedParameter("exit_gate.weight", "exit_gate.weight", "1 h", "last", is_head=True, in_fp32=True),
    AddedParameter("exit_gate.bias", "exit_gate.bias", "1", "last", is_head=True, in_fp32=True),
)
INITIAL_STATES = (
    AddedParameter("initial_output", "model.initial_output", "h", "first", "trunc-normal", trained=False),
    AddedParameter("initial_latent", "model.initial_latent", "h", "first", "trunc-normal", trained=False),
)
COMBINING = {  # by the word of a pass
    "concat": (AddedParameter("adapter.weight", "model.adapter.weight", "h 2h", "first", "identity"),),
    "diagonal": (  # decay exp(-delta exp(A_log)), which starts at sqrt(.2), and gain delta = softplus(dt_bias)
        AddedParameter("injection.A_log", "model.injection.A_log", "h", "first"),
        AddedParameter("injection.dt_bias", "model.injection.dt_bias", "h", "first", math.log(math.sqrt(5.0) - 1.0)),
        AddedParameter("injection.B", "model.injection.B", "h h", "first", "identity", decays=False),
    ),
}  # fmt: skip
MOVING = {  # by the word of a pass
    "gate": Mover("boundary_gate", (
        AddedParameter("boundary_gate.A_log", "model.boundary_gate.A_log", "h", "first"),
        AddedParameter("boundary_gate.bias", "model.boundary_gate.bias", "h", "first", "step"),
        AddedParameter("boundary_gate.down", "model.boundary_gate.down", "r h", "first", "identity", decays=False),
        AddedParameter("boundary_gate.up", "model.boundary_gate.up", "r h", "first", decays=False),
    ), kept=6),
    "norm-inject": Mover("boundary_norm", (), kept=2),
}  # fmt: skip
EVERY = (*HALTING_HEAD, *EXIT_GATE, *INITIAL_STATES, *(each for declared in COMBINING.values() for each in declared),
         *(each for mover in MOVING.values() for each in mover.parameters))  # fmt: skip


def added_parameters(plan: RecursionPlan) -> tuple[AddedParameter, ...]:
    """What a plan's words ask for, in the order of :data:`EVERY`."""
    asked: tuple[AddedParameter, ...] = ()
    if plan.has_halting:
        asked += HALTING_HEAD
    if plan.exit_gate:
        asked += EXIT_GATE
    asked += tuple(each for each in INITIAL_STATES if each.key.removeprefix("initial_") in plan.initial_vectors)
    for word in plan.maps:  # [I | 0] passes the state on; where that knows nothing of the tokens, [0 | I] the input
        start = "identity" if plan.starts_at_input else "identity at the end"
        asked += tuple(replace(p, start=start) if word == "concat" else p for p in COMBINING[word])
    for word in plan.moves:
        step = next(p.step for p in plan.passes if p.move == word)
        # b with exp(-softplus(b)) = step, or .99 where that is 1, which a gate never is.
        opened = math.log(math.expm1(max(-math.log(step), 0.01)))
        asked += tuple(replace(p, start=opened) if p.start == "step" else p for p in MOVING[word].parameters)
    return asked


def combining_flops(decoder_pass: DecoderPass, hidden_size: int) -> float:
    """Forward FLOPs per token of what a pass does with what it reads, before its layers, and with what they make."""
    moving = MOVING[decoder_pass.move].parameters if decoder_pass.move in MOVING else ()
    declared = (*COMBINING.get(decoder_pass.combine, ()), *moving)
    return 2.0 * sum(each.size(hidden_size) for each in declared)


def sampled_start(tokens: Any, hidden_size: int, std: float, draw: Any = 0) -> Any:
    """A normal for each token, truncated at three standard deviations, as fp32 [..., hidden_size].

    A function of its arguments alone, the same on every device and however tokens are spread over ranks: a hash in
    place of a generator's state.

    Args:
        tokens: an integer tensor of what tells tokens apart, such as their positions. draw: a number, or such a tensor.
    """
    rows = _hashed(_hashed(tokens.unsqueeze(-1) ^ _hashed(draw ^ SEED)))
    columns = _hashed(tokens.new_ones(hidden_size).cumsum(-1) * 0x9E3779B9)
    uniform = (_hashed(_hashed(rows ^ columns)) >> 8).float() / 2**24 + 2.0**-25
    within = math.erf(3 / math.sqrt(2))
    return (within * (2 * uniform - 1)).erfinv() * (math.sqrt(2) * std)


def tokens_so_far(tokens: Any, places: Any = None) -> Any:
    """[B, S] of token ids to numbers that tell each token and all before it from others: what training draws by.

    ``places``: [B, S], of each token in its document, where a row holds several, each of which is told alone.
    """
    columns = tokens.new_ones(tokens.shape).cumsum(-1) - 1
    places = columns if places is None else places
    told = _hashed(_hashed(tokens) ^ ((places + 1) * 0x9E3779B9))
    total = told.cumsum(-1)
    return (total - (total - told).gather(-1, columns - places)) & 0xFFFFFFFF


def _hashed(x: Any) -> Any:
    """A permutation of 32-bit numbers that leaves no pattern (lowbias32), in a wider type."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def start_of(parameter: AddedParameter, knobs: object) -> float | str:
    """Where a fresh one starts; ``knobs`` has those that a start may name."""
    start = parameter.start
    return float(getattr(knobs, start)) if isinstance(start, str) and hasattr(knobs, start) else start
