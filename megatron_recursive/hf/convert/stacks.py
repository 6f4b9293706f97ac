"""Which layers of a donor become prelude, core and coda: as given, from an analysis's file, or as published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError

STACKS = ("prelude", "core", "coda")
# Donor -> prelude, core, coda. The first two stand in the conversion scripts of Retrofitting Recurrence (arXiv
# 2511.07384), which leave out layers before the core; the third is the split of Encode-Think-Decode (arXiv 2510.07358)
# as the fork LoopedLMs/retrofitting-recurrence converts it. For Llama-3.2-1B sizes are published (4, 6, 4), no layers.
PRESETS: dict[str, tuple[str, str, str]] = {
    "TinyLlama-1.1B": ("0-3", "10-17", "18-21"),
    "OLMo-2-0425-1B": ("0-3", "6-11", "12-15"),
    "OLMo-2-0425-1B-ETD": ("0-6", "7-10", "11-15"),
}


@dataclass(frozen=True)
class StackChoice:
    """What an import was asked for: layers as ``--layers`` takes them, a JSON file, or a name of ``PRESETS``."""

    prelude: str | None = None
    core: str | None = None
    coda: str | None = None
    from_analysis: str | None = None
    preset: str | None = None

    def flags(self) -> list[str]:
        """The flags that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]

    def read(self, total: int) -> dict[str, list[int]] | None:
        """The layers of each stack, of a donor of ``total`` layers; None where nothing was asked for.

        Raises:
            UserError: layers that are not there, stand in two stacks, or leave the core empty; two ways at once.
        """
        flags = self.flags()
        if not flags:
            return None
        if len(flags) > 1 and flags[-1] in ("--from-analysis", "--preset"):
            raise UserError(f"{flags[-1]} excludes {flags[0]}; give either.")
        if self.from_analysis is not None:
            return _checked(_analysis(Path(self.from_analysis)), total, f"{self.from_analysis}: ")
        texts: dict[str, str | None] = {name: getattr(self, name) for name in STACKS}
        if self.preset is not None:
            texts = dict(zip(STACKS, PRESETS[self.preset], strict=True))
            if _size(self.preset) != total:
                raise UserError(f"--preset {self.preset} is for {_size(self.preset)} layers; this model has {total}.")
        read = {name: [] if text is None else layer_numbers(text, f"--{name}", total) for name, text in texts.items()}
        return _checked(read, total, "--")


def layer_numbers(text: str, flag: str, total: int) -> list[int]:
    """Numbers and ranges with commas, such as 0-3,8, in the order in which they are given."""
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if found is None:
            raise UserError(f"{flag} {text} must be whole numbers and ranges with commas, such as 0-3,8,16,23.")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < total:
            raise UserError(f"{flag} {text}: the model has the layers 0 to {total - 1}, and a range counts up.")
        chosen += range(first, last + 1)
    if len(set(chosen)) != len(chosen):
        raise UserError(f"{flag} {text} names a layer twice.")
    return chosen


def ranges(layers: list[int]) -> str:
    """The inverse of :func:`layer_numbers`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def published(donor: str, total: int) -> list[str]:
    """The presets for a donor of that name, of ``total`` layers."""
    return [name for name in PRESETS if name.removesuffix("-ETD").lower() in donor.lower() and _size(name) == total]


def _size(preset: str) -> int:
    return int(PRESETS[preset][-1].rpartition("-")[2]) + 1  # a coda ends with the donor


def _analysis(file: Path) -> dict[str, list[int]]:
    wanted = 'give a JSON object with the lists of layers "prelude", "core" and "coda"'
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"--from-analysis {file} cannot be read ({reason}); {wanted}.") from error
    lists: dict[str, Any] = {name: values.get(name) if isinstance(values, dict) else None for name in STACKS}
    for name, layers in lists.items():
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            raise UserError(f"--from-analysis {file} has no list of whole numbers {name!r}; {wanted}.")
    return lists


def _checked(stacks: dict[str, list[int]], total: int, where: str) -> dict[str, list[int]]:
    if not stacks["core"]:
        raise UserError(f"{where}core has no layers; it takes those that run r times, such as 4-11.")
    seen: dict[int, str] = {}
    for name, layers in stacks.items():
        for layer in layers:
            if not 0 <= layer < total:
                raise UserError(f"{where}{name} has layer {layer}, but the model has the layers 0 to {total - 1}.")
            if layer in seen:
                raise UserError(f"{where}{name} has layer {layer}, which {seen[layer]} has already.")
            seen[layer] = name
    return stacks


def stack_knobs(stacks: Mapping[str, list[int]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Recursion knobs with what the stacks say of them.

    Raises:
        UserError: a knob that was given says otherwise.
    """
    said = {"recursion_family": "recurrent", "enable_recursive_refinement": True,
            "num_prelude_layers": len(stacks["prelude"]), "num_coda_layers": len(stacks["coda"])}  # fmt: skip
    for name, value in said.items():
        if given.get(name, value) != value:
            flag = "--disable-recursive-refinement" if value is True else f"--{name.replace('_', '-')} {given[name]}"
            raise UserError(f"{flag} contradicts the chosen stacks ({name.replace('_', ' ')} {value}); leave it out.")
    return {**said, **given}
