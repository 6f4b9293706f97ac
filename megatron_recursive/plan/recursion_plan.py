"""The plan of a recursion: an ordered list of decoder passes over the same layers.

Whoever asks in what order passes run, which carry gradient and which are supervised reads it here: the model walks it,
the FLOPs counter sums it, checkpoints and exports carry it. This file ships inside an export (hf/model/__init__.py), so
that it imports the standard library alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise, starmap
from typing import Any

from megatron_recursive.errors import UserError

STATES = ("output", "latent")
# Where states start: whether the output starts at the input, and which states start at a vector; else at zeros, or, of
# a sampled start, at a normal for each token.
STARTS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "zeros": (False, ()), "trunc-normal": (False, STATES), "sampled": (False, ()),
    "input": (True, ()), "input, trunc-normal": (True, ("latent",)),
}  # fmt: skip
STATE_NORMS = ("final", "none", "core", "core-end")
READABLE = (*STATES, "input")
MAPS = {  # ways to combine two values that are no sum: as a table says it, and as help does
    "concat": ("[{}, {}]", "a linear map of both side by side (Huginn)"),
    "diagonal": ("a {} + B {}", "the state times a learned decay below 1, plus a linear map of the input (Parcae)"),
}
MOVES = {  # ways to move a state that are no fixed step: what they take besides the result; as a table and help say it
    "gate": (("target",), "gate from {:.3g}", "by a learned part per channel and token, at first the step (LoopUS)"),
    "norm-inject": (("input",), "norm + input", "to its normalised result plus the prelude's (arXiv 2609.19107)"),
}
WHOLE = (("core", None),)  # all layers are one stack
OF_TRAINING = ("index", "block", "grad", "cuts_states", "supervised_weight", "halt_weight")  # no part of the result


def is_number(value: Any) -> bool:
    """A finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DecoderPass:
    """One application of a stack of layers: ``state[target] += step * (stack(what it reads) - state[target])``.

    Attributes:
        index: position in the plan, from 0.
        block: refinement block that the pass belongs to, from 0.
        target: what the result moves: ``output``, ``latent``, or ``input`` (a prelude).
        reads: some of ``output``, ``latent`` and ``input`` (the embedding, or what a prelude made of it), in order.
        grad: whether the pass is recorded for the backward pass.
        cuts_states: whether output and latent are detached from the graph before the pass.
        supervised_weight: weight of the language-model loss on the result; 0 where there is none.
        halt_weight: weight of the halting loss on the result; 0 where there is none.
        stack: name of the layers that it runs, one of the plan's ``stacks``.
        step: how far the target moves towards the result; 1 replaces it.
        move: ``step``, or one of :data:`MOVES`.
        combine: what the stack is given of the values read: their ``sum``; or of two, a linear map of both side by side
            (``concat``), or the first times a decay below 1, plus a linear map of the second (``diagonal``).
    """

    index: int
    block: int
    target: str
    reads: tuple[str, ...]
    grad: bool
    cuts_states: bool = False
    supervised_weight: float = 0.0
    halt_weight: float = 0.0
    stack: str = "core"
    step: float = 1.0
    combine: str = "sum"
    move: str = "step"

    @property
    def replaces_state(self) -> bool:
        """Whether the target becomes the bare result."""
        return self.move == "step" and self.step == 1

    @property
    def moved_with(self) -> tuple[str, ...]:
        """The states that the target's new value is made of, besides the result."""
        if self.move in MOVES:
            return tuple(self.target if name == "target" else name for name in MOVES[self.move][0])
        return () if self.replaces_state else (self.target,)

    def to_dict(self) -> dict[str, Any]:
        """Words that say nothing new are left out, so that older readers know all that they find."""
        usual = {"stack": "core", "step": 1.0, "combine": "sum", "move": "step"}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}


@dataclass(frozen=True)
class RecursionPlan:
    """A validated sequence of passes and what holds for all of them.

    Attributes:
        family: name of the builder: ``plain``, ``core``, ``recurrent``, ``looped`` or ``hierarchical``.
        passes: in the order in which they run.
        state_init: where states start: at zeros, at a seeded vector, or the output at the ``input`` or ``sampled`` (a
            normal of std ``state_std`` for each token) and the latent at zeros or at a seeded vector (:data:`STARTS`).
        state_norm, embedding_multiplier: as in ``RecursionConfig``, resolved. See :meth:`closes`.
        stacks: (name, layers) in the order in which the model holds them; those without a number share the rest.
        mean_steps: the steps of a recurrent core are 1 / r, and stay that at another r.
        exit_gate: a gate gives the probability of leaving after each block; it weighs their language-model losses.

    Raises:
        UserError: the passes contradict each other, or a parameter group would get no gradient.
    """

    family: str
    passes: tuple[DecoderPass, ...]
    state_init: str = "zeros"
    state_norm: str = "final"
    embedding_multiplier: float = 1.0
    stacks: tuple[tuple[str, int | None], ...] = WHOLE
    mean_steps: bool = False
    state_std: float = 1.0
    exit_gate: bool = False

    @classmethod
    def plain(cls, embedding_multiplier: float = 1.0) -> RecursionPlan:
        """``output = decoder(input)``: a plain GPT."""
        only = DecoderPass(index=0, block=0, target="output", reads=("input",), grad=True, supervised_weight=1.0)
        return cls("plain", (only,), embedding_multiplier=embedding_multiplier)

    def __post_init__(self) -> None:
        if not self.passes:
            raise UserError("A plan needs at least one pass (--num-refinement-blocks).")
        if self.state_init not in STARTS:
            raise UserError(f"state_init of a plan must be one of {'; '.join(STARTS)}, but is {self.state_init}.")
        if self.state_norm not in STATE_NORMS:
            raise UserError(f"state_norm of a plan must be one of {', '.join(STATE_NORMS)}, but is {self.state_norm}.")
        for name in ("embedding_multiplier", "state_std"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} must be a positive number, but is {getattr(self, name)}.")
        if len(dict(self.stacks)) != len(self.stacks) or None not in dict(self.stacks).values():
            raise UserError("The stacks of a plan need different names, and one of them takes the rest of the layers.")
        last = self.passes[-1]
        learns = last.supervised_weight > 0 or (self.trains_heads_only and (last.halt_weight > 0 or self.exit_gate))
        if last.target != "output" or not learns:
            raise UserError("The last pass of a plan must update the output state and be supervised.")
        for expected, decoder_pass in enumerate(self.passes):
            self._check_pass(expected, decoder_pass)
        supervised = self.trains_heads_only or all(p.supervised_weight > 0 for p in self.block_ends)
        if self.exit_gate and (self.has_halting or not supervised):
            raise UserError("An exit gate stands in place of a halting head and needs every block supervised.")
        starved = [group for group, fed in self.gradient_groups(tied_embeddings=False).items() if not fed]
        if starved and not self.trains_heads_only:
            mend = "raise --num-latent-refinements"
            if self.stacks != WHOLE:
                mend = "give --injection add" + ", or no --backprop-depth" * (self.state_init == "input")
            raise UserError(
                f"The parameter group '{starved[0]}' would receive no gradient: no pass with gradient reads the "
                f"{'states' if starved[0] == 'layers' else f'input ({mend})'}."
            )

    def _check_pass(self, expected: int, decoder_pass: DecoderPass) -> None:
        where = f"Pass {expected} of the plan"
        if decoder_pass.index != expected:
            raise UserError(f"{where} is numbered {decoder_pass.index}.")
        allowed = (self.passes[expected - 1].block, self.passes[expected - 1].block + 1) if expected else (0,)
        if decoder_pass.block not in allowed:
            raise UserError(f"{where} jumps to block {decoder_pass.block}.")
        if decoder_pass.target not in READABLE:
            raise UserError(f"{where} updates '{decoder_pass.target}', which is none of {', '.join(READABLE)}.")
        if decoder_pass.stack not in dict(self.stacks):
            raise UserError(f"{where} runs the stack '{decoder_pass.stack}', which the plan does not have.")
        if not (is_number(decoder_pass.step) and 0 < decoder_pass.step <= 1):
            raise UserError(f"{where} moves its state by {decoder_pass.step}, which must lie above 0 and be at most 1.")
        if decoder_pass.move != "step" and (decoder_pass.move not in MOVES or decoder_pass.target not in STATES):
            raise UserError(f"{where} moves the {decoder_pass.target} by '{decoder_pass.move}', where there are step, "
                            f"and for {' and '.join(STATES)} {', '.join(MOVES)}.")  # fmt: skip
        if not decoder_pass.replaces_state:
            following = self.passes[expected + 1 : expected + 2]
            if self.is_block_end(decoder_pass) or decoder_pass.target not in following[0].reads:
                raise UserError(f"{where} moves its state by a part, so that the next pass of its block must read it.")
            if decoder_pass.grad and not following[0].grad:
                raise UserError(f"{where} moves its state by a part, so that the next pass must carry gradient too.")
        if not decoder_pass.reads or set(decoder_pass.reads) - set(READABLE):
            raise UserError(f"{where} must read some of {', '.join(READABLE)}.")
        if decoder_pass.combine != "sum" and (decoder_pass.combine not in MAPS or len(decoder_pass.reads) != 2):
            raise UserError(f"{where} combines {len(decoder_pass.reads)} values by '{decoder_pass.combine}'; there are "
                            f"sum, and of two values {', '.join(MAPS)}.")  # fmt: skip
        if (decoder_pass.supervised_weight or decoder_pass.halt_weight) and decoder_pass.target != "output":
            raise UserError(f"{where} is supervised but does not update the output state.")
        for name in ("supervised_weight", "halt_weight"):
            weight = getattr(decoder_pass, name)
            if not (is_number(weight) and weight >= 0):
                raise UserError(f"{where} has the {name} {weight}, which is no number of at least 0.")
            if weight and not self.is_block_end(decoder_pass):
                raise UserError(f"{where} is supervised before its block ends; only a block's last pass can be.")
        if not (isinstance(decoder_pass.grad, bool) and isinstance(decoder_pass.cuts_states, bool)):
            raise UserError(f"{where} must say true or false under grad and cuts_states.")
        if decoder_pass.supervised_weight and not decoder_pass.grad:
            raise UserError(f"{where} is supervised but carries no gradient.")

    @cached_property
    def num_passes(self) -> int:
        return len(self.passes)

    @cached_property
    def num_blocks(self) -> int:
        return self.passes[-1].block + 1

    @property
    def passes_per_block(self) -> int:
        """Of blocks that are alike."""
        return self.num_passes // self.num_blocks

    def known(self, index: int) -> DecoderPass:
        """What a walk runs as pass ``index``, from 0: beyond the plan its last block again."""
        size = self.passes_per_block
        return self.passes[index if index < len(self.passes) else index % size - size]

    @property
    def depth(self) -> int:
        """What :meth:`with_blocks` changes: blocks, loops, or passes of a recurrent core."""
        return len(self.parts)

    @cached_property
    def parts(self) -> tuple[range, ...]:
        """The passes of each of those that :attr:`depth` counts, by index."""
        if self.has_inner_depth:
            return tuple(range(p.index, p.index + 1) for p in self.passes if p.stack == "core")
        return tuple(starmap(range, pairwise((0, *(p.index + 1 for p in self.block_ends)))))

    @cached_property
    def block_ends(self) -> tuple[DecoderPass, ...]:
        """The last pass of every block: after it the output state can be read."""
        return tuple(filter(self.is_block_end, self.passes))

    @property
    def starts_at_input(self) -> bool:
        """Whether the output starts at the input."""
        return STARTS[self.state_init][0]

    @property
    def samples_start(self) -> bool:
        """Whether the output starts at a draw for each token."""
        return self.state_init == "sampled"

    @property
    def initial_vectors(self) -> tuple[str, ...]:
        """The states that start at a vector, one [H] for all tokens."""
        return () if self.is_plain else STARTS[self.state_init][1]

    @cached_property
    def has_inner_depth(self) -> bool:
        """Its depth is that of a core within one block, so that only its end is read; others repeat blocks."""
        return self.family == "recurrent"

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """The states that a step of training may leave to the next one (``--num-supervision-steps``).

        None where the output starts at the input, which a next step would not read, or steps depend on the depth.
        """
        if self.is_plain or self.starts_at_input or self.mean_steps:
            return ()
        return tuple(name for name in STATES if any(name in p.reads for p in self.passes))

    @cached_property
    def carried_behind(self) -> int:
        """Index of the pass behind which states are carried: the last one, or that before a coda."""
        return max(p.index for p in self.passes if p.stack != "coda")

    @cached_property
    def grad_passes(self) -> tuple[DecoderPass, ...]:
        return tuple(p for p in self.passes if p.grad)

    @cached_property
    def trains_heads_only(self) -> bool:
        """No pass carries gradient: on frozen weights, the heads learn that recursion adds."""
        return not self.grad_passes

    def heads_only(self) -> RecursionPlan:
        """The plan that computes the same and teaches the heads alone (--train-only heads).

        Raises:
            UserError: it has none.
        """
        if not (self.has_halting or self.exit_gate):
            raise UserError(
                "--train-only heads trains the heads that a recursion adds, of which this model has none; a halting "
                "head needs a recursion of another family than recurrent, and a --halt-loss-weight above 0."
            )
        return replace(self, passes=tuple(replace(p, grad=False, supervised_weight=0.0) for p in self.passes))

    def sources(self, decoder_pass: DecoderPass) -> tuple[str, ...]:
        """What the pass reads, an output that still is the input being named ``input``."""
        return self._named(decoder_pass, decoder_pass.reads)

    def _named(self, decoder_pass: DecoderPass, names: tuple[str, ...]) -> tuple[str, ...]:
        starts = self.starts_at_input and all(p.target != "output" for p in self.passes[: decoder_pass.index])
        return tuple("input" if name == "output" and starts else name for name in names)

    def first_input_gradient(self, prelude: Sequence[DecoderPass] = ()) -> DecoderPass | None:
        """The first pass with gradient, behind a prelude, before which the input is used: its gradient is complete
        behind it. It reads the input, or a state that was moved with it.
        """
        for p in (p for p in self.grad_passes if p not in prelude):
            if "input" in self._named(p, (*p.reads, *p.moved_with)):
                return p if "input" in self.sources(p) else self.passes[p.index + 1]
        return None

    def layers_of(self, num_layers: int) -> dict[str, range]:
        """The layers of each stack, from 0, in a model that holds ``num_layers`` in all.

        Raises:
            UserError: they do not suffice, or cannot be shared equally.
        """
        sharing = sum(count is None for _, count in self.stacks)
        rest = num_layers - sum(count or 0 for _, count in self.stacks)
        if rest < sharing or rest % sharing:
            raise UserError(
                f"--num-layers {num_layers} must hold {', '.join(f'{c} of the {n}' for n, c in self.stacks if c)}"
                f"{' and ' if rest < num_layers else ''}at least one layer of each other stack, in equal parts "
                f"({', '.join(n for n, c in self.stacks if c is None)})."
            )
        ranges, start = {}, 0
        for name, count in self.stacks:
            size = rest // sharing if count is None else count
            ranges[name], start = range(start, start + size), start + size
        return ranges

    def layers_by_pass(self, layers_per_stage: Sequence[int]) -> list[tuple[int, ...]]:
        """How many layers each pass runs on each pipeline stage, whose layers are given in order."""
        stacks, starts = self.layers_of(sum(layers_per_stage)), list(accumulate(layers_per_stage, initial=0))
        stages = [range(start, start + count) for start, count in zip(starts, layers_per_stage, strict=False)]
        held = {name: tuple(len(range(max(a.start, b.start), min(a.stop, b.stop))) for b in stages)
                for name, a in stacks.items()}  # fmt: skip
        return [held[p.stack] for p in self.passes]

    def unrolled_layers(self, num_layers: int) -> int:
        """How many layers a token goes through."""
        return sum(layers for (layers,) in self.layers_by_pass([num_layers]))

    def feeds_gradient(self, sender: DecoderPass) -> bool:
        """Whether a pass with gradient reads what ``sender`` computed, before it is cut from the graph or replaced."""
        if not sender.grad:
            return False
        for later in self.passes[sender.index + 1 :]:
            if later.cuts_states and sender.target != "input":
                return False
            kept = self._named(later, later.moved_with)
            if later.grad and sender.target in (*self.sources(later), *(name for name in kept if name != later.target)):
                return True
            if sender.target == later.target and not (later.grad and sender.target in kept):
                return False
        return False

    @cached_property
    def has_halting(self) -> bool:
        return any(p.halt_weight > 0 for p in self.passes)

    @cached_property
    def maps(self) -> tuple[str, ...]:
        """The words of its passes' ``combine`` that are no sum."""
        return tuple(word for word in MAPS if any(p.combine == word for p in self.passes))

    @cached_property
    def moves(self) -> tuple[str, ...]:
        """The words of its passes' ``move`` that are no step."""
        return tuple(word for word in MOVES if any(p.move == word for p in self.passes))

    @cached_property
    def is_plain(self) -> bool:
        """One pass from the input to the output: a plain GPT."""
        return self.family == "plain"

    def is_block_end(self, decoder_pass: DecoderPass) -> bool:
        following = decoder_pass.index + 1
        return following == len(self.passes) or self.passes[following].block != decoder_pass.block

    def is_projected(self, decoder_pass: DecoderPass) -> bool:
        """Whether training asks what the language-model head says of the pass."""
        gated = self.exit_gate and self.is_block_end(decoder_pass)
        return decoder_pass.supervised_weight > 0 or decoder_pass.halt_weight > 0 or gated

    def is_replayed(self, decoder_pass: DecoderPass) -> bool:
        """Whether its logits are computed again in the backward, so that those of one block live at a time."""
        return decoder_pass.supervised_weight > 0 and decoder_pass is not self.passes[-1]

    def closes(self, decoder_pass: DecoderPass) -> bool:
        """Whether the final norm closes the pass: of ``final`` every one, of ``core`` all of that stack, of
        ``core-end`` the last of them, and of ``none`` no pass."""
        if self.state_norm in ("final", "none"):
            return self.state_norm == "final"
        core = [p.index for p in self.passes if p.stack == "core"]
        return decoder_pass.index in (core if self.state_norm == "core" else core[-1:])

    @property
    def norms_before_heads(self) -> bool:
        """Whether the final norm stands before the heads, too: where it does not close every pass."""
        return self.state_norm != "final"

    def gradient_groups(self, *, tied_embeddings: bool) -> dict[str, bool]:
        """Which parameter groups receive gradient. A tied embedding is also reached through the output head."""
        fed = [p for p in self.grad_passes if p is self.passes[-1] or self.feeds_gradient(p)]
        reached = any("input" in self._named(p, (*p.reads, *p.moved_with)) for p in fed)
        run = {p.stack for p in fed}
        layers = {"layers" if name == "core" else f"{name} layers": name in run for name, count in self.stacks
                  if count != 0}  # fmt: skip
        groups = {"embedding": reached or (tied_embeddings and bool(fed)), **layers, "output head": bool(fed)}
        if self.has_halting:
            groups["halting head"] = True
        if self.exit_gate:
            groups["exit gate"] = True
        return groups

    def with_blocks(self, count: int) -> RecursionPlan:
        """The plan with another number of blocks: inner ones are dropped or repeated, the last one stays.

        The weights of the halting loss keep their sum, and those of the language-model loss, but for an exit gate's. Of
        a recurrent plan, which is one block, the core is repeated.
        """
        if count < 1:
            raise UserError(f"The number of refinement blocks must be at least 1, but is {count}.")
        if self.has_inner_depth:
            return self._with_core(count)
        blocks = [[p for p in self.passes if p.block == block] for block in range(self.num_blocks)]
        inner = blocks[-2] if len(blocks) > 1 else blocks[-1]
        if len(blocks) == 1 and not self.exit_gate:
            inner = [replace(p, supervised_weight=0.0) for p in inner]
        chosen = [*(blocks[:-1] + [inner] * count)[: count - 1], blocks[-1]]
        scales = {}
        for word in ("halt_weight", *["supervised_weight"] * (not self.exit_gate)):
            before, after = (sum(getattr(p, word) for block in each for p in block) for each in (blocks, chosen))
            scales[word] = before / after if after else 0.0
        cuts = len(blocks) > 1 and blocks[-1][0].cuts_states
        passes = [
            replace(p, block=number, cuts_states=number > 0 and (p.cuts_states or (cuts and p is block[0])),
                    **{word: getattr(p, word) * scale for word, scale in scales.items()})
            for number, block in enumerate(chosen) for p in block
        ]  # fmt: skip
        return replace(self, passes=tuple(replace(p, index=index) for index, p in enumerate(passes)))

    def _with_core(self, count: int) -> RecursionPlan:
        core = [p for p in self.passes if p.stack == "core"]
        before, behind = self.passes[: core[0].index], self.passes[core[-1].index + 1 :]
        repeated = ([replace(core[0], supervised_weight=0.0)] * count + core)[-count:]
        if self.mean_steps:
            repeated = [replace(p, step=1.0 / count) for p in repeated]
        passes = enumerate([*before, *repeated, *behind])
        return replace(self, passes=tuple(replace(p, index=index) for index, p in passes))

    def to_json(self) -> str:
        """Words that say nothing new are left out, as in :meth:`DecoderPass.to_dict`."""
        idle = {"stacks": self.stacks == WHOLE, "mean_steps": not self.mean_steps, "exit_gate": not self.exit_gate,
                "state_std": not self.samples_start}  # fmt: skip
        values = {name: value for name, value in asdict(self).items() if not idle.get(name)}
        return json.dumps({**values, "passes": [p.to_dict() for p in self.passes]}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RecursionPlan:
        """The inverse of :meth:`to_json`. A UserError says what is wrong with a text that is no plan."""
        try:
            values = json.loads(text)
        except (ValueError, TypeError) as error:
            raise UserError(f"Not a recursion plan in JSON ({type(error).__name__}: {error}).") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecursionPlan:
        """As :meth:`from_json`, of what the text holds."""
        try:
            passes = [{**each, "reads": tuple(each["reads"])} for each in values["passes"]]
            known = {field.name for kind in (cls, DecoderPass) for field in fields(kind)}
            if unknown := sorted({*values, *(name for each in passes for name in each)} - known):
                raise UserError(f"The plan holds '{unknown[0]}', which this version does not know.")
            stacks = tuple((each[0], each[1]) for each in values.get("stacks", WHOLE))
            return cls(**{**values, "passes": tuple(DecoderPass(**each) for each in passes), "stacks": stacks})
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"Not a recursion plan ({type(error).__name__}: {error}).") from error

    def describe(self) -> str:
        """The passes as a table for people, one line a block where all its latent passes are alike."""
        has_stacks, has_steps = self.stacks != WHOLE, not all(p.replaces_state for p in self.passes)
        rows = [("passes", "block", *["layers"] * has_stacks, "update", *["step"] * has_steps, "reads", "gradient",
                 "lm loss", "halt loss")]  # fmt: skip
        for _, alike in groupby(self.passes, lambda p: replace(p, index=0, cuts_states=False)):
            p, last = (run := [*alike])[0], run[-1]
            span = str(p.index + 1) if p is last else f"{p.index + 1}-{last.index + 1}"
            weights = (f"{p.supervised_weight:g}{' p' * self.exit_gate}" if p.supervised_weight else "-",
                       f"{p.halt_weight:.3g}" if p.halt_weight else "-")  # fmt: skip
            step = (MOVES[p.move][1] if p.move in MOVES else "{:.3g}").format(p.step)
            reads = MAPS[p.combine][0].format(*p.reads) if p.combine in MAPS else " + ".join(p.reads)
            stack = ["-" if dict(self.stacks)[p.stack] == 0 else p.stack] * has_stacks
            grad = "yes" if p.grad else "no"
            rows.append((span, str(p.block + 1), *stack, p.target, *[step] * has_steps, reads, grad, *weights))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        legend = ["p: the probability of leaving there, by the exit gate"] if self.exit_gate else []
        return "\n".join([*(line.rstrip() for line in lines), *legend])
