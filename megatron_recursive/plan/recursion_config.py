"""The knobs of a recursion, set and checked: the flags, the plan and an exported config are made from this class."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.depth_distributions import check_depths
from megatron_recursive.plan.growth import check_growth
from megatron_recursive.plan.knobs import (
    ARTICLES,
    DEEP,
    DEPTH_LIST,
    DEPTHS,
    HALTING,
    KEPT,
    OTHER_NAMES,
    PARTS,
    ExitKnobs,
    FunctionKnobs,
    HeadKnobs,
    ObservationKnobs,
    TrainingKnobs,
    families_of,
    flag_of,
    knobs_in,
)
from megatron_recursive.plan.supervision_steps import check_carried


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
        check_depths(self)
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
            off = knob.name == "halt_loss_weight" and value == 0
            if value != knob.default and not off:
                self.refuse_foreign(knob.name)

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
    def move(self) -> str:
        """The word of a pass that moves a state as ``boundary`` says."""
        return "step" if self.boundary == "none" else self.boundary

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
        self._require(knob.name, holds, f"must be {ARTICLES[wanted]}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{flag_of(name)} {rule}, but is {getattr(self, name)}.")

    @property
    def has_halting(self) -> bool:
        has_blocks = self.recursion_family != "recurrent"
        return self.enable_recursive_refinement and has_blocks and self.halt_loss_weight > 0 and not self.exit_gate

    def refuse_foreign(self, name: str) -> None:
        """Refuse a knob, at the value that it has here, which the family does not know."""
        value, (knob,) = getattr(self, name), [each for each in dataclasses.fields(self) if each.name == name]
        families = families_of(name, value) or (self.recursion_family,)
        if self.recursion_family not in families:
            flag = f"{flag_of(name)} {value}"
            if isinstance(value, bool):
                flag = flag_of(name) if value else knob.metadata["off"]
            raise UserError(
                f"{flag} belongs to --recursion-family {' or '.join(families)}, but the family is "
                f"{self.recursion_family}."
            )

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

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> RecursionConfig:
        """The same of what a checkpoint or an export of any version holds."""
        return cls(**stored_knobs(values))

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


def stored_knobs(values: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a checkpoint or an export. Other families have stored a cut between blocks, once core's default."""
    knobs = knobs_in(values)
    if knobs.get("recursion_family", "core") != "core":
        knobs.pop("detach_between_refinements", None)
    return knobs


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


def renewed(theirs: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a source, with those that are given in place of its own; of fewer blocks the windows of the last,
    and without recursion no factor on the embedding."""
    if not given.get("enable_recursive_refinement", True):
        theirs = {**theirs, "embedding_multiplier": None}
    windows = str(theirs.get("latent_backprop_depth", "")).split(",")[-given.get("num_refinement_blocks", 0) :]
    return {**theirs, **({"latent_backprop_depth": ",".join(windows)} if any(windows) else {}), **given}


def initial_std(hidden_size: int) -> float:
    """The std at which the matrices of a fresh recursive model start, where --init-method-std does not say otherwise.

    1 / sqrt(width): a matrix then keeps the scale of what it is applied to. At a fixed 0.02 a pass through a narrow
    model is nearly the identity, and V passes are V copies (guide, section 2).
    """
    return float(hidden_size) ** -0.5


def add_recursion_arguments(
    parser: argparse.ArgumentParser, parts: Collection[Any] = PARTS, *, only_given: bool = False
) -> argparse.ArgumentParser:
    """Add one flag per knob of some parts; ``only_given`` leaves those out of the namespace that are not given."""
    origin = ("what is not given is the source's own; a source without recursion becomes recurrent by thirds with "
              "--recurrence-step mean in convert import and plan, stays plain in count without any, and "
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
