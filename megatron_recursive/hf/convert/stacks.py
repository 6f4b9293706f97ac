"""Which layers of a donor become prelude, core and coda: as given, from an analysis's file, or as published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of

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
        flags, where = self.flags(), "--"
        if len(flags) > 1 and flags[-1] in ("--from-analysis", "--preset"):
            raise UserError(f"{flags[-1]} excludes {flags[0]}; give either.")
        texts: Mapping[str, str | None] = vars(self)
        if self.from_analysis is not None:
            texts, where = _analysis(Path(self.from_analysis)), f"{flags[0]} {self.from_analysis}: "
        elif self.preset is not None:
            texts, where = dict(zip(STACKS, PRESETS[self.preset], strict=True)), f"{flags[0]} {self.preset}: "
        stacks = {name: layer_numbers(texts[name] or "", where + name, total) if texts[name] else [] for name in STACKS}
        chosen = [layer for layers in stacks.values() for layer in layers]
        if twice := [layer for layer in chosen if chosen.count(layer) > 1]:
            raise UserError(f"{', '.join(flags)}: layer {twice[0]} is in two of prelude, core and coda.")
        if flags and not stacks["core"]:
            raise UserError(f"{where}core has no layers; it takes those that run r times, such as 4-11.")
        if self.preset is not None and chosen[-1] != total - 1:
            raise UserError(f"{flags[0]} {self.preset} is for {chosen[-1] + 1} layers, but this model has {total}.")
        return stacks if flags else None


def layer_numbers(text: str, where: str, total: int) -> list[int]:
    """Numbers and ranges with commas, such as 0-3,8, in the order in which they are given."""
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if found is None:
            raise UserError(f"{where} {text} must be whole numbers and ranges with commas, such as 0-3,8,16,23.")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < total:
            raise UserError(f"{where} {text}: the model has the layers 0 to {total - 1}, and a range counts up.")
        chosen += range(first, last + 1)
    if len(set(chosen)) != len(chosen):
        raise UserError(f"{where} {text} names a layer twice.")
    return chosen


def ranges(layers: list[int]) -> str:
    """The inverse of :func:`layer_numbers`."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _analysis(file: Path) -> dict[str, str | None]:
    """The lists of a file, as they would be given by hand."""
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        lists = [values[name] for name in STACKS]
        if not all(isinstance(each, list) and all(type(layer) is int for layer in each) for each in lists):
            raise ValueError("these are no lists of whole numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        wanted = "a JSON object with the lists prelude, core and coda"
        raise UserError(f"--from-analysis {file} must be {wanted} ({reason}).") from error
    return {name: ",".join(map(str, each)) or None for name, each in zip(STACKS, lists, strict=True)}


def stack_knobs(stacks: Mapping[str, list[int]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Recursion knobs, with what the stacks say of them; a UserError where one was given that says otherwise."""
    said = {"recursion_family": "recurrent", "enable_recursive_refinement": True,
            "num_prelude_layers": len(stacks["prelude"]), "num_coda_layers": len(stacks["coda"])}  # fmt: skip
    for name, value in said.items():
        if given.get(name, value) != value:
            raise UserError(f"{flag_of(name)} {given[name]} contradicts the chosen stacks, which make it {value}.")
    return {**said, **given}
