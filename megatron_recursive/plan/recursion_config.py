"""Every knob of the recursion, once: the flags, the plan and an exported config are made from this class."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.growth import check_growth
from megatron_recursive.plan.recursion_plan import MAPS, MOVES
from megatron_recursive.plan.supervision_steps import check_carried


def _knob(default: Any, help: str, *, choices: tuple[str, ...] | None = None, off: str | None = None,
          type: Any = None, words: tuple[str, ...] | None = None) -> Any:
    """A field with what its flag needs. ``off`` names the flag that turns a boolean off, ``words`` the whole numbers
    of a flag that takes several."""
    meta = {"help": help, "choices": choices, "off": off, "type": type or default.__class__, "words": words}
    return field(default=default, metadata=meta)


DEEP = ("deep_supervision_weight", "deep_supervision_schedule", "deep_supervision_warmup")
HALTING = ("halt_loss_weight", "halt_bias", "halt_supervision", "halt_target")
OF_FAMILIES = {  # knobs that not every family knows
    "num_refinement_blocks": ("core", "looped", "hierarchical"),
    "num_latent_refinements": ("core", "hierarchical"),
    "detach_between_refinements": ("core",),
    "state_init": ("core", "hierarchical"), "state_std": ("recurrent",),
    "state_norm": ("core", "looped", "hierarchical"),
    "num_recurrences": ("recurrent",),
    "num_prelude_layers": ("recurrent",),
    "num_coda_layers": ("recurrent",),
    "injection": ("recurrent",),
    "recurrence_step": ("recurrent",),
    "boundary": ("core", "recurrent", "hierarchical"),
    **dict.fromkeys(("backprop_depth", "backprop_curriculum", "backprop_curriculum_fraction"), ("recurrent",)),
    **dict.fromkeys(HALTING, ("core", "looped", "hierarchical")),
    **dict.fromkeys(("exit_gate", "exit_entropy_weight"), ("looped",)),
    **dict.fromkeys(("enable_deep_supervision", *DEEP), ("core", "looped", "hierarchical")),
    "latent_backprop_depth": ("hierarchical",),
    "num_supervision_steps": ("core", "recurrent"),
    **dict.fromkeys(("carry_halted", "halt_exploration"), ("core",)),
}

OTHER_NAMES = {"num_refinement_blocks": "--H-cycles", "num_latent_refinements": "--L-cycles",
               "latent_backprop_depth": "--L-bp-cycles"}  # fmt: skip
OF_WORDS = {  # words of those knobs that other families know
    ("state_init", "sampled"): ("recurrent",),
    ("state_norm", "none"): ("core", "looped", "hierarchical", "recurrent"),
    ("state_norm", "core"): ("recurrent",),
    ("state_norm", "core-end"): ("recurrent",),
    ("boundary", "norm-inject"): ("recurrent",),
}

DEPTH_LIST = r"[1-9]\d*(,[1-9]\d*)*"
DEPTHS = ("num_refinement_blocks", "num_latent_refinements", "num_recurrences")


def families_of(name: str, value: Any) -> tuple[str, ...] | None:
    """The families that know a knob at a value; None for all."""
    return OF_WORDS.get((name, value)) or OF_FAMILIES.get(name)


_ARTICLES = {bool: "on or off", int: "a whole number", float: "a number", str: "a word", tuple: "whole numbers"}


@dataclass(frozen=True)
class FunctionKnobs:
    """What equal weights compute. A checkpoint made with another value is refused."""

    enable_recursive_refinement: bool = _knob(
        True, "Refine recursively. Off, the model is Megatron's plain GPT, bit for bit.",
        off="--disable-recursive-refinement")
    recursion_family: str = _knob(
        "core", "core: T blocks of n latent passes and an output pass over one stack of layers (TRM). recurrent: a "
        "prelude, r passes of a core, a coda (Huginn). looped: the whole stack T times (Ouro). hierarchical: as core, "
        "but latent and output have a stack each (HRM).",
        choices=("core", "recurrent", "looped", "hierarchical"))
    num_refinement_blocks: int = _knob(
        3, "T: refinement blocks; the output state is updated once at the end of each.")
    num_latent_refinements: int = _knob(
        6, "n: latent refinements in each block, before its output update.")
    num_recurrences: int = _knob(
        4, "r: passes of the core of a recurrent family.")
    num_prelude_layers: int = _knob(
        0, "Layers that run once before the core of a recurrent family. The first pipeline stage is best to hold all "
        "(--decoder-first-pipeline-num-layers): then they cost no trip around the stages.")
    num_coda_layers: int = _knob(
        0, "Layers that run once behind the core of a recurrent family. The last pipeline stage is best to hold all "
        "(--decoder-last-pipeline-num-layers).")
    injection: str = _knob(
        "none", "What a pass of a recurrent core reads besides its state: nothing, or the prelude's result too: the "
        f"sum (add), or {', or '.join(f'{said} ({word})' for word, (_, said) in MAPS.items())}.",
        choices=("none", "add", *MAPS))
    recurrence_step: str = _knob(
        "1", "How far a pass of a recurrent core moves its state towards its result: 1, mean (1 / r, for layers that "
        "were pretrained to run once), or a number between.")
    boundary: str = _knob(
        "none", "How a pass of a recurrent core moves its state, or a latent refinement the latent state: by the step "
        f"(none), {', or '.join(f'{said} ({word})' for word, (_, _, said) in MOVES.items())}.",
        choices=("none", *MOVES))
    state_init: str = _knob(
        "zeros", "Initial output and latent states: zeros, or one seeded truncated-normal vector per state (a buffer). "
        "In a hierarchical family that of the latent state; the output starts at the input. A recurrent core starts at "
        "the prelude's result, or sampled: at a truncated normal for each token.",
        choices=("zeros", "trunc-normal", "sampled"))
    state_std: float = _knob(
        0.4**0.5, "Standard deviation of a sampled start; sqrt(2/5) is Huginn's beside inputs of unit scale.")
    state_norm: str = _knob(
        "final", "final: the decoder's norm closes every pass. none: it runs once, before the output head, as it does "
        "in a recurrent family. There it may also close every pass of the core (core), or the last one (core-end).",
        choices=("final", "none", "core", "core-end"))
    embedding_multiplier: float | None = _knob(
        None, "Factor on the embedding, which must stand at the scale of the states. Default: 1 / embedding init std "
        "for recursive runs from scratch, 1 for runs that start from a plain GPT and when recursion is off.",
        type=float)
    exit_gate: bool = _knob(
        False, "Give a looped model an exit gate in place of the halting head: a probability of leaving after each "
        "loop, which weighs the losses of all loops (Ouro).", off="--no-exit-gate")


@dataclass(frozen=True)
class HeadKnobs:
    """The halting head or exit gate that a model is built with. A change on a resume is told, in the next parts too."""

    halt_loss_weight: float = _knob(
        1.0, "Weight of the halting loss: total loss = lm loss + weight * halt loss. 0 builds no halting head.")
    halt_bias: float = _knob(
        -5.0, "Initial bias of the halting head. About 0 is known to trap training at shallow depth.")


@dataclass(frozen=True)
class TrainingKnobs:
    """How the weights are trained: gradient, initial values, what the head learns."""

    detach_between_refinements: bool = _knob(
        True, "Cut the states at every block start, so that only the last block carries gradient: less memory and "
        "FLOPs, but on text a model of T = 2, n = 1 lost 0.5 nats or more by it. Off, gradients pass all blocks.",
        off="--no-detach-between-refinements")
    enable_deep_supervision: bool = _knob(
        False, "Take the language-model loss after every block and not only after the last one: through all blocks, or, "
        "where --detach-between-refinements cuts between them, each block by its own loss.",
        off="--disable-deep-supervision")
    deep_supervision_weight: float = _knob(
        0.5, "b: with deep supervision, the weight of earlier blocks' losses, where the last block's has 1; then all "
        "are divided by their sum.")
    deep_supervision_schedule: str = _knob(
        "constant", "Of N blocks, block i from 0 weighs b (constant), b (i + 1) / N (linear_decay) or b 2^i / 2^(N-1) "
        "(exponential_decay); the last weighs 1.", choices=("constant", "linear_decay", "exponential_decay"))
    deep_supervision_warmup: tuple[int, int] | None = _knob(
        None, "Iterations between which b grows from 0 to its value. Before them a run is one without deep "
        "supervision. Default: b from the start.", type=tuple, words=("START", "END"))
    backprop_depth: int = _knob(
        0, "The last so many passes of a recurrent core carry gradient; 0: all.")
    recurrence_distribution: str = _knob(
        "fixed", "Depth of a training step (--num-recurrences or --num-refinement-blocks): always that, or drawn anew "
        "for each: min(cap, 1 + Poisson(rate)) of a log-normal rate (Huginn), or uniform around the mean.",
        choices=("fixed", "poisson-lognormal", "uniform"))
    mean_recurrence: float | None = _knob(
        None, "Mean of drawn depths. Default: the model's own depth, at which it is evaluated and exported.",
        type=float)
    max_recurrence: int | None = _knob(
        None, "Cap on drawn depths. Default: four times the mean; uniform ones go from 2 mean - cap to the cap, by "
        "default from 1 to 2 mean - 1.", type=int)
    uncalibrated_recurrence: bool = _knob(
        False, "Take Huginn's own rate, whose mean is --mean-recurrence, so that the mean depth is one more, less what "
        "the cap takes.", off="--calibrated-recurrence")
    recurrence_curriculum: str | None = _knob(
        None, "Let the (mean) depth R grow from 1: ceil(R f(t)) at a part t of --recurrence-curriculum-fraction, f "
        "being t (linear) or 1 - sqrt(1 - t) (1-sqrt).", choices=("linear", "1-sqrt"), type=str)
    recurrence_curriculum_fraction: float = _knob(
        0.25, "Fraction of the training that the curriculum of depth takes.")
    backprop_curriculum: str | None = _knob(
        None, "The same for --backprop-depth.", choices=("linear", "1-sqrt"), type=str)
    backprop_curriculum_fraction: float = _knob(
        0.25, "Fraction of the training that the curriculum of --backprop-depth takes.")
    grow_depth_at: str | None = _knob(
        None, "FRACTION:K, such as 0.77:4. Behind that fraction of the training the model is K deep, more than before: "
        "blocks, loops, or passes of a recurrent core.", type=str)
    grow_rewarm_iters: int = _knob(
        0, "Iterations over which the learning rate then rises from 0 to the scheduled one again.")
    latent_backprop_depth: str = _knob(
        "0", "The last so many latent refinements of each block of a hierarchical family carry gradient: a number for "
        "the last block (1 for those before it), or with commas one for each of the last blocks; 0: all.")
    init_depth_scaling: str | None = _knob(
        None, "Output projections are initialised with std / sqrt(2 L): L the layers held, or the layers unrolled over "
        "all passes. Default: held; unrolled where --state-norm is none, as in a recurrent family.",
        choices=("held", "unrolled"), type=str)
    halt_supervision: str = _knob(
        "all", "Blocks whose state teaches the halting head: all (earlier ones through their detached state), or last.",
        choices=("all", "last"))
    halt_target: str = _knob(
        "correct", "A token should halt where its arg-max is the label (correct), or where its arg-max is already "
        "that of the last block (agrees-with-last).", choices=("correct", "agrees-with-last"))
    exit_entropy_weight: float = _knob(
        0.1, "With an exit gate: loss = sum over the loops of p * lm loss, less this times the entropy of p (Ouro: "
        "0.1, later 0.05).")
    num_supervision_steps: int = _knob(
        1, "N: optimizer steps for each global batch, each from the states, detached, that the one before left (TRM: "
        "16). An iteration is an optimizer step. Evaluations and exports run the plan N times in a row.")
    carry_halted: bool = _knob(
        False, "Replace a sample of which every token that counts halts (--halt-threshold) after the last block by a "
        "new one, whose states start anew, before its N supervision steps are over (TRM).", off="--no-carry-halted")
    halt_exploration: float = _knob(
        0.1, "With --carry-halted, the probability with which, at a step, a sample is kept unless it has had a drawn "
        "number of supervision steps, 2 to N (TRM).")


@dataclass(frozen=True)
class ExitKnobs:
    """Where generation stops, unless it is told otherwise there."""

    halt_threshold: float = _knob(
        0.5, "A token halts at the first block whose halting probability reaches this. Higher refines longer.")
    max_inference_refinement_steps: int = _knob(
        12, "Cap on the blocks that adaptive halting may run at inference.")


@dataclass(frozen=True)
class ObservationKnobs:
    """What a run says of itself. Neither run.json nor an export holds it, and no resume compares it."""

    recursion_alarm_after: int | None = _knob(
        None, "Iteration from which the health alarms speak (state ignored, tokens collapsed). 0 turns them off. "
        "Default: a tenth of the run, at most 500.", type=int)
    eval_depths: str | None = _knob(
        None, "Depths at which each evaluation reads its batches too, with commas between them: blocks, loops, or "
        "passes of a recurrent core. A pass of the whole evaluation each; of blocks and loops only the deepest.",
        type=str)


PARTS = (FunctionKnobs, HeadKnobs, TrainingKnobs, ExitKnobs, ObservationKnobs)
TRAINED, KEPT = PARTS[:3], PARTS[:4]


def knobs_in(values: Mapping[str, Any], parts: Collection[Any] = PARTS) -> dict[str, Any]:
    """Those of the knobs of some parts that a mapping holds (a checkpoint's arguments, say)."""
    names = (knob.name for part in parts for knob in dataclasses.fields(part))
    return {name: values[name] for name in names if name in values}


@dataclass(frozen=True)
class RecursionConfig(ObservationKnobs, ExitKnobs, TrainingKnobs, HeadKnobs, FunctionKnobs):  # the last comes first
    """The recursion knobs, named as their flags are (``num_refinement_blocks`` is ``--num-refinement-blocks``).

    Frozen and validated: a value that makes no sense raises :class:`UserError` naming the flag. Hashable, built of
    primitives only, and free of torch. ``embedding_multiplier`` and ``init_depth_scaling`` may be None ("choose");
    :meth:`resolved` puts numbers there.
    """

    def __post_init__(self) -> None:
        if isinstance(self.deep_supervision_warmup, list):  # of a command line or JSON
            object.__setattr__(self, "deep_supervision_warmup", tuple(self.deep_supervision_warmup))
        for knob in dataclasses.fields(self):
            self._check_type(knob)
        if re.fullmatch(r"\d+\.\d*|\.\d+", self.recurrence_step):  # 1.0 is 1
            object.__setattr__(self, "recurrence_step", repr(float(self.recurrence_step)).removesuffix(".0"))
        for name in ("num_refinement_blocks", "num_latent_refinements", "max_inference_refinement_steps"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("num_recurrences", self.num_recurrences >= 1, "must be at least 1")
        for name in ("num_prelude_layers", "num_coda_layers", "backprop_depth"):
            self._require(name, getattr(self, name) >= 0, "must be 0 or more")
        self._check_family()
        windows = self.latent_backprop_depth
        holds = re.fullmatch(f"0|{DEPTH_LIST}", windows) and windows.count(",") < self.num_refinement_blocks
        self._require("latent_backprop_depth", bool(holds),
                      f"must be 0, or at most {self.num_refinement_blocks} numbers above 0 with commas between them")
        self._check_depth_of_steps()
        check_growth(self)
        check_carried(self)
        after = self.recursion_alarm_after
        self._require("recursion_alarm_after", after is None or after >= 0, "must be 0 (off) or positive")
        wanted = self.eval_depths
        self._require("eval_depths", wanted is None or bool(re.fullmatch(DEPTH_LIST, wanted)),
                      "must be numbers above 0 with commas between them, such as 1,4,16")
        if wanted is not None and not self.enable_recursive_refinement:
            raise UserError("--eval-depths needs a recursion; leave it or --disable-recursive-refinement out.")
        self._require("halt_threshold", 0.0 < self.halt_threshold < 1.0, "must lie strictly between 0 and 1")
        self._require("halt_loss_weight", self.halt_loss_weight >= 0 and math.isfinite(self.halt_loss_weight),
                      "must be 0 or a positive number")
        self._require("exit_entropy_weight", 0 <= self.exit_entropy_weight < math.inf, "must be 0 or a positive number")
        self._require("halt_bias", math.isfinite(self.halt_bias), "must be a finite number")
        self._check_deep_supervision()
        multiplier = self.embedding_multiplier
        self._require("embedding_multiplier", multiplier is None or (multiplier > 0 and math.isfinite(multiplier)),
                      "must be a positive number")
        for knob in dataclasses.fields(self):
            value, choices = getattr(self, knob.name), knob.metadata["choices"]
            if choices is not None and value is not None:
                self._require(knob.name, value in choices, f"must be one of {', '.join(choices)}")

    def _check_family(self) -> None:
        """A knob that the family does not know is refused by name."""
        try:
            holds = self.recurrence_step == "mean" or 0 < float(self.recurrence_step) <= 1
        except ValueError:
            holds = False
        self._require("recurrence_step", holds, "must be 1, mean, or a number above 0 and below 1")
        for knob in dataclasses.fields(self):
            value = getattr(self, knob.name)
            families = families_of(knob.name, value) or (self.recursion_family,)
            off = knob.name == "halt_loss_weight" and value == 0
            if self.recursion_family not in families and value != knob.default and not off:
                flag = f"{flag_of(knob.name)} {value}"
                if isinstance(value, bool):
                    flag = flag_of(knob.name) if value else knob.metadata["off"]
                raise UserError(
                    f"{flag} belongs to --recursion-family {' or '.join(families)}, but the family is "
                    f"{self.recursion_family}."
                )

        self._require("injection", self.state_init != "sampled" or self.injection != "none",
                      "leaves a start that is sampled (--state-init) without the input; give it add or concat")
        for name, off in (("injection", "none"), ("recurrence_step", "1")):
            self._require(name, self.boundary != "norm-inject" or getattr(self, name) == off,
                          f"does not go with --boundary norm-inject, which adds the input itself; give it {off}")
        self._require("state_std", self.state_std > 0 and math.isfinite(self.state_std), "must be a positive number")
        default = RecursionConfig.__dataclass_fields__["state_std"].default
        self._require("state_std", self.state_init == "sampled" or self.state_std == default,
                      "says nothing without --state-init sampled")
        if self.exit_gate and self.num_refinement_blocks < 2:
            raise UserError("--exit-gate chooses between loops; give --num-refinement-blocks 2 or more.")
        idle = (*HALTING, "halt_threshold") if self.exit_gate else ("exit_entropy_weight",)
        for knob in (knob for knob in dataclasses.fields(self) if knob.name in idle):
            if getattr(self, knob.name) not in (knob.default, 0.0):
                other = "without --exit-gate" if not self.exit_gate else "with --exit-gate, which has no halting head"
                raise UserError(f"{flag_of(knob.name)} says nothing {other}; leave it out.")

    def _check_depth_of_steps(self) -> None:
        for name in ("mean_recurrence", "max_recurrence"):
            value = getattr(self, name)
            self._require(name, value is None or 1 <= value < math.inf, "must be a number of at least 1")
        for name in ("recurrence_curriculum", "backprop_curriculum"):
            fraction = getattr(self, f"{name}_fraction")
            self._require(f"{name}_fraction", 0 < fraction <= 1, "must be above 0 and at most 1, the whole training")
        drawn, needs = "--recurrence-distribution poisson-lognormal", {}
        if self.recurrence_distribution == "fixed":
            needs = dict.fromkeys(("mean_recurrence", "max_recurrence"), f"{drawn} or uniform")
        if self.recurrence_distribution != "poisson-lognormal":
            needs["uncalibrated_recurrence"] = drawn
        if not self.backprop_depth:
            needs["backprop_curriculum"] = "--backprop-depth"
        for name in ("recurrence_curriculum", "backprop_curriculum"):
            if getattr(self, name) is None:
                needs[f"{name}_fraction"] = flag_of(name)
        for knob in (knob for knob in dataclasses.fields(self) if knob.name in needs):
            if getattr(self, knob.name) != knob.default:
                raise UserError(f"{flag_of(knob.name)} says nothing without {needs[knob.name]}; leave it out.")

    @property
    def depth_knob(self) -> str:
        """The knob that says how deep a plan of the family is."""
        return "num_recurrences" if self.recursion_family == "recurrent" else "num_refinement_blocks"

    @property
    def depths_to_evaluate(self) -> tuple[int, ...]:
        return tuple(sorted({int(each) for each in self.eval_depths.split(",")})) if self.eval_depths else ()

    def _check_deep_supervision(self) -> None:
        weight, warmup = self.deep_supervision_weight, self.deep_supervision_warmup
        self._require("deep_supervision_weight", 0 < weight < math.inf, "must be a positive number")
        holds = warmup is None or (len(warmup) == 2 and 0 <= warmup[0] < warmup[1])
        self._require("deep_supervision_warmup", holds, "must be two iterations, START below END")
        if self.enable_deep_supervision and self.exit_gate:
            raise UserError("--exit-gate weighs the losses of all loops itself; leave --enable-deep-supervision out.")
        if self.enable_deep_supervision and self.num_refinement_blocks < 2:
            raise UserError("--enable-deep-supervision supervises the blocks before the last one, of which a recursion "
                            "of --num-refinement-blocks 1 has none; give 2 or more.")  # fmt: skip
        for knob in (knob for knob in dataclasses.fields(self) if knob.name in DEEP):
            if not self.enable_deep_supervision and getattr(self, knob.name) != knob.default:
                raise UserError(f"{flag_of(knob.name)} says nothing without --enable-deep-supervision; leave it out.")

    @property
    def step_size(self) -> float:
        """Of a pass of a recurrent core."""
        return 1.0 / self.num_recurrences if self.recurrence_step == "mean" else float(self.recurrence_step)

    @property
    def latent_windows(self) -> tuple[int, ...]:
        """How many latent refinements carry gradient, of each block."""
        given = [int(each) for each in self.latent_backprop_depth.split(",")]
        if given == [0]:
            return (self.num_latent_refinements,) * self.num_refinement_blocks
        return (*(1,) * (self.num_refinement_blocks - len(given)), *given)

    def _check_type(self, knob: dataclasses.Field[Any]) -> None:
        value, wanted = getattr(self, knob.name), knob.metadata["type"]
        if value is None and knob.default is None:
            return
        holds = isinstance(value, int | float if wanted is float else wanted)
        if isinstance(value, bool):
            holds = wanted is bool
        if isinstance(value, tuple):
            holds = holds and all(type(each) is int for each in value)
        self._require(knob.name, holds, f"must be {_ARTICLES[wanted]}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{flag_of(name)} {rule}, but is {getattr(self, name)}.")

    @property
    def has_halting(self) -> bool:
        has_blocks = self.recursion_family != "recurrent"
        return self.enable_recursive_refinement and has_blocks and self.halt_loss_weight > 0 and not self.exit_gate

    def resolved(self, *, embedding_init_std: float, from_plain_gpt: bool = False) -> RecursionConfig:
        """The same config with every "choose" replaced by what it comes to in this run."""
        multiplier, scaling = self.embedding_multiplier, self.init_depth_scaling
        if not self.enable_recursive_refinement and multiplier not in (None, 1.0):
            raise UserError(
                f"--embedding-multiplier {multiplier} belongs to a recursion; with --disable-recursive-refinement the "
                "model is Megatron's plain GPT."
            )
        if multiplier is None:
            fresh = self.enable_recursive_refinement and not from_plain_gpt
            if fresh and embedding_init_std <= 0:
                raise UserError(
                    f"--init-method-std {embedding_init_std} gives the embedding no scale; give --embedding-multiplier."
                )
            multiplier = 1.0 / embedding_init_std if fresh else 1.0
        if scaling is None:
            one_stream = self.state_norm == "none" or self.recursion_family == "recurrent"
            scaling = "unrolled" if self.enable_recursive_refinement and one_stream else "held"
        return dataclasses.replace(self, embedding_multiplier=multiplier, init_depth_scaling=scaling)

    def to_dict(self) -> dict[str, Any]:
        """What is kept with weights: all parts but what only observes."""
        return knobs_in(vars(self), KEPT)

    def flags(self) -> list[str]:
        """The knobs as words of a command line; those left to be chosen are left out."""
        words = []
        for knob in dataclasses.fields(self):
            value = getattr(self, knob.name)
            if isinstance(value, bool):
                words.append(flag_of(knob.name) if value else knob.metadata["off"])
            elif isinstance(value, tuple):
                words += [flag_of(knob.name), *map(str, value)]
            elif value is not None:
                words.append(f"{flag_of(knob.name)}={value}")
        return words

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RecursionConfig:
        """Pick the knobs out of a mapping; absent ones take defaults."""
        return cls(**knobs_in(values))

    def differences(self, other: RecursionConfig) -> list[Difference]:
        """The kept knobs in which ``other`` differs. Once recursion is off, only that counts."""
        mine, theirs = self.to_dict(), other.to_dict()
        binding = knobs_in(mine, [FunctionKnobs])
        found = [Difference(n, mine[n], theirs[n], n in binding) for n in mine if mine[n] != theirs[n]]
        if self.enable_recursive_refinement != other.enable_recursive_refinement:
            return [d for d in found if d.name == "enable_recursive_refinement"]
        return found if self.enable_recursive_refinement else []


@dataclass(frozen=True)
class Difference:
    """One knob that two configs set differently; ``binds`` where it is one of the function."""

    name: str
    mine: Any
    theirs: Any
    binds: bool

    @property
    def is_depth(self) -> bool:
        return self.name in DEPTHS


def retrofit(given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The recursion of pretrained layers that costs them least, where no knob of another one is given.

    The first and the last third run once, the middle third several times in steps of 1 / r (arXiv 2605.23872).
    """
    family = given.get("recursion_family")
    foreign = [name for name in given if "recurrent" not in (families_of(name, given[name]) or ("recurrent",))]
    own = [name for name in given if families_of(name, given[name]) == ("recurrent",)]
    if foreign and (family == "recurrent" or own):
        raise UserError(f"{flag_of(foreign[0])} does not go with --recursion-family recurrent; leave one of them out.")
    if foreign or family not in (None, "recurrent") or not given.get("enable_recursive_refinement", True):
        return {}
    third = layers // 3
    return {"recursion_family": "recurrent", "num_prelude_layers": third, "num_coda_layers": third,
            "recurrence_step": "mean"}  # fmt: skip


def initial_std(hidden_size: int) -> float:
    """The std at which the matrices of a fresh recursive model start, where --init-method-std does not say otherwise.

    1 / sqrt(width): a matrix then keeps the scale of what it is applied to. At a fixed 0.02 a pass through a narrow
    model is nearly the identity, and V passes are V copies (guide, section 2).
    """
    return float(hidden_size) ** -0.5


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_recursion_arguments(
    parser: argparse.ArgumentParser, parts: Collection[Any] = PARTS, *, only_given: bool = False
) -> argparse.ArgumentParser:
    """Add one flag per knob of some parts; ``only_given`` leaves those out of the namespace that are not given."""
    origin = ("what is not given is the source's own; a source without recursion becomes recurrent by thirds with "
              "--recurrence-step mean in convert import and plan --hf, stays plain in count --model without any, and "
              "elsewhere has the defaults of pretrain") if only_given else None  # fmt: skip
    group = parser.add_argument_group("recursion", origin)
    for knob in (knob for part in parts for knob in dataclasses.fields(part)):
        text, default = knob.metadata["help"], argparse.SUPPRESS if only_given else knob.default
        if isinstance(knob.default, bool):
            group.add_argument(flag_of(knob.name), action="store_true", default=default, dest=knob.name,
                               help=text + ("" if only_given else f" (default: {'on' if knob.default else 'off'})"))
            group.add_argument(knob.metadata["off"], action="store_false", default=default, dest=knob.name,
                               help=f"The opposite of {flag_of(knob.name)}.")
            continue
        suffix = "" if only_given or knob.default is None else f" (default: {knob.default})"
        several = knob.metadata["words"]
        if several is not None:
            group.add_argument(flag_of(knob.name), nargs=len(several), metavar=several, type=int, default=default,
                               dest=knob.name, help=text)  # fmt: skip
            continue
        names = [flag_of(knob.name), *([OTHER_NAMES[knob.name]] if knob.name in OTHER_NAMES else [])]
        group.add_argument(*names, default=default, choices=knob.metadata["choices"], dest=knob.name,
                           action=_Named if len(names) > 1 else "store",
                           type=knob.metadata["type"], help=text + suffix)  # fmt: skip
    return parser


class _Named(argparse.Action):
    """Stores what a flag of two names is given, which must agree where both are."""

    given: tuple[Any, str, Any] = (None, "", None)  # the namespace, the name and the value of the last time

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, name: str | None = None) -> None:
        parsed, other, before = self.given
        if parsed is namespace and other != name and before != value:
            raise UserError(f"{other} {before} and {name} {value} are two names of one knob; give one of them.")
        self.given = namespace, str(name), value
        setattr(namespace, self.dest, value)
