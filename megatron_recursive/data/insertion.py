"""Steps of datatrove's that a user puts between reading and tokenizing: ``--pipeline MODULE:FUNCTION``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    from megatron_recursive.data.steps import PartReader


@dataclass(frozen=True)
class Surroundings:
    """What FUNCTION is given; it returns the steps, and may first run pipelines of its own over the same documents.

    ``reader`` reads the documents of part ``rank`` of ``parts``, in the order in which they reach the steps; ``folder``
    is kept until the dataset is complete, so that what was run is there when an interrupted run goes on.
    """

    reader: PartReader
    parts: int
    workers: int
    folder: Path


def steps_of(name: str, surroundings: Surroundings) -> list[Any]:
    """The steps that ``MODULE:FUNCTION`` returns.

    Raises:
        UserError: there is no such function, or it returns no steps.
    """
    from datatrove.pipeline.base import PipelineStep

    module, _, function = name.partition(":")
    make = getattr(importlib.import_module(module), function, None)
    steps = make(surroundings) if callable(make) else None
    if not isinstance(steps, list) or not all(isinstance(step, PipelineStep) for step in steps):
        raise UserError(f"--pipeline {name} must be a function that returns a list of datatrove's steps")
    return steps


def source_digest(name: str) -> str:
    """What the module's file holds now: parts that another version of it made are not taken.

    Raises:
        UserError: there is no such module.
    """
    if os.getcwd() not in sys.path:  # the console script leaves it out
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None or found.origin is None or ":" not in name:
        raise UserError(f"--pipeline {name} must be MODULE:FUNCTION, the module in {os.getcwd()} or on Python's path")
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:16]
