"""The file of an ablation (:data:`SCHEMA` is its format), read and refused in sentences."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import CommandParser
from megatron_recursive.errors import UserError

SCHEMA = """\
output: runs/ablations/recursion   # folder of runs and results; --output wins
flags: >                           # pretraining flags of all runs: one text, or a list
  --num-layers 2 --hidden-size 128 --lr-warmup-iters 30 --eval-iters 50 ...
arms:                              # name: its further flags, which win over the common ones
  recursion: --num-refinement-blocks 2
  own layers: --disable-recursive-refinement
  deep:                            # with learning rates of its own
    flags: --num-layers 8 --disable-recursive-refinement --nproc-per-node 2
    learning_rates: [1e-3, 2e-3]
learning_rates: [2e-3, 4e-3, 8e-3] # --lr and, unless flags say, a tenth of it as --min-lr: all of
seeds: [1, 2, 3]                   # them with the first seed, the best of them with the others
iterations: 300                    # of the arm that 'equal' names, or else the first
equal: tokens                      # what all arms spend: tokens or flops; with the arm, {flops: deep}
"""
NEEDED = ("arms", "learning_rates", "seeds", "iterations", "output")
# Flags that an ablation gives itself -> the key that says them.
OWN_FLAGS = {"--lr": "learning_rates", "--seed": "seeds", "--train-iters": "iterations", "--save": "output",
             "--train-samples": "iterations", "--load": "output", "--metrics-file": "output"}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One model of an ablation; ``flags`` hold the common ones too, ``processes`` are those of each of its runs."""

    name: str
    flags: tuple[str, ...]
    rates: tuple[float, ...]
    processes: int


@dataclass(frozen=True)
class Ablation:
    """What the file says. All arms spend as much of ``equal`` as ``reference`` does in ``iterations``."""

    output: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    iterations: int
    equal: str
    reference: str


def read_config(file: str | Path, output: str | None = None) -> Ablation:
    """The ablation of a file. A UserError says what cannot be read or is wrong."""
    import yaml

    class Loader(yaml.SafeLoader):  # which keeps the last of two keys that are one
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for at, (key, _) in enumerate(node.value):
                if key.value in keys[:at]:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return _read(yaml.load(Path(file).read_text(encoding="utf-8"), Loader), output)
    except OSError as error:
        raise UserError(f"Cannot read {file} ({error.strerror}); name an ablation's YAML file.") from error
    except (yaml.YAMLError, ValueError, UserError) as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: {' '.join(str(what).split()).rstrip('.')}.") from error


def _read(values: Any, output: str | None) -> Ablation:
    _check_keys(values, ("flags", "equal", *NEEDED), "")
    if not isinstance(values.get("output", ""), str):
        raise UserError(f"output must be a folder's name, but is {values['output']}")
    values["output"] = output or values.get("output")
    for key in NEEDED:
        if not values.get(key):
            raise UserError(f"{key} is missing; --help shows a whole file")
    _check_keys(values["arms"], (), "arms")
    arms = tuple(_arm(str(name), given, values) for name, given in values["arms"].items())
    equal = values.get("equal", "tokens")
    kind, reference = next(iter(equal.items())) if isinstance(equal, dict) and equal else (equal, arms[0].name)
    _check_keys({str(kind): None}, ("tokens", "flops"), "equal: ")
    _check_keys({str(reference): None}, [arm.name for arm in arms], f"equal: {kind}: ")
    seeds, iterations = (_numbers(values[key], key, int) for key in ("seeds", "iterations"))
    if len(iterations) > 1:
        raise UserError(f"iterations must be one number, but are {values['iterations']}")
    return Ablation(Path(values["output"]), arms, seeds, iterations[0], kind, str(reference))


def _arm(name: str, given: Any, common: dict[str, Any]) -> Arm:
    rates = common["learning_rates"]
    if isinstance(given, dict):
        _check_keys(given, ("flags", "learning_rates"), f"arms.{name}.")
        given, rates = given.get("flags"), given.get("learning_rates", rates)
    launcher = CommandParser(lambda _: None, add_help=False)
    launcher.add_argument("--nproc-per-node", type=int, default=1)
    known, flags = launcher.parse_known_args([*_words(common.get("flags"), "flags"), *_words(given, f"arms.{name}")])
    if known.nproc_per_node < 1:
        raise UserError(f"arms.{name}: --nproc-per-node must be at least 1, but is {known.nproc_per_node}")
    return Arm(name, tuple(flags), tuple(sorted(_numbers(rates, "learning_rates", float))), known.nproc_per_node)


def _check_keys(values: Any, known: Collection[str], where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'it'} must hold keys and values; --help shows a whole file")
    for key in values:
        if known and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1) or [" or ".join(known)]
            raise UserError(f"there is no {where}{key}; the nearest is {near[0]}")


def _words(value: Any, where: str) -> list[str]:
    words = [word for part in (value if isinstance(value, list) else [value or ""]) for word in shlex.split(str(part))]
    for flag in (word.partition("=")[0] for word in words):
        if flag in OWN_FLAGS:
            raise UserError(f"{where} must not hold {flag}, which follows from {OWN_FLAGS[flag]}")
    return words


def _numbers[Number: (int, float)](value: Any, key: str, kind: type[Number]) -> tuple[Number, ...]:
    """Positive ones, each once. YAML 1.1 takes 2e-3, which has no point, for a text."""
    try:
        numbers = [kind(str(each)) for each in (value if isinstance(value, list) else [value])]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise UserError(f"{key} must be positive {'whole ' * (kind is int)}numbers, but are {value}")
    return tuple(dict.fromkeys(numbers))
