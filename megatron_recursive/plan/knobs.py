"""Every knob of the recursion, once, in the parts that say who reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_recursive.plan.recursion_plan import MAPS, MOVES


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


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


ARTICLES = {bool: "on or off", int: "a whole number", float: "a number", str: "a word", tuple: "whole numbers"}


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
        6, "n: latent refinements in each block, before its output update. Small models learned more of a text at "
        "T = 2, n = 1 than at the defaults.")
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
        False, "Cut the states at every block start, so that only the last block carries gradient: less memory and "
        "FLOPs, but small models lost what depth gives by it, on text (T = 2, n = 1; T = 3, n = 6) and on hops. Off, "
        "gradients pass all blocks.",
        off="--no-detach-between-refinements")
    enable_deep_supervision: bool = _knob(
        False, "Take the language-model loss after every block and not only after the last one: through all blocks, "
        "or, where --detach-between-refinements cuts between them, each block by its own loss.",
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
        12, "Cap on the blocks that adaptive halting may run at inference. A model of more than the default has none.")


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
