"""Reads the metrics.jsonl that a run writes: one JSON object a line, with its kind and iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError

KINDS = ("run", "train", "valid", "test", "alarm")
NUMBERS = ("time", "tokens", "tokens per iteration", "FLOPs per token")


def read_records(metrics_file: str | Path) -> list[dict[str, Any]]:
    """The records of a run, in the order of the file.

    A last line without its newline is left out: a running job is still writing it.

    Raises:
        UserError: the file is missing, or a line is malformed; the message names file and line.
    """
    metrics_file = Path(metrics_file)
    try:
        lines = metrics_file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {metrics_file} ({error.strerror}); name a run or its metrics.jsonl") from error
    return [_parse(line, f"{metrics_file}:{n}") for n, line in enumerate(lines[:-1], start=1) if line.strip()]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON; remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; remove the line")
    kind, iteration = record.get("kind"), record.get("iteration")
    if kind not in KINDS:
        raise UserError(f"{where} has the kind {kind!r}; it must be one of {', '.join(KINDS)}")
    if not isinstance(iteration, int) or isinstance(iteration, bool):
        raise UserError(f"{where} has the iteration {iteration!r}; it must be a whole number")
    for name, value in record.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if ("loss" in name or "block" in name or name in NUMBERS) and not is_number:
            raise UserError(f"{where} has {value!r} under {name!r}; it must be a number")
    return record
