"""The JSON records that sweep, layers and health write, and what reads them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import PROGRAM
from megatron_recursive.errors import UserError

VERSIONS = {"sweep": 1, "layers": 1, "health": 1}


def head(kind: str) -> dict[str, Any]:
    """What a record begins with."""
    return {"format": f"{PROGRAM} {kind}", "version": VERSIONS[kind]}


def kind_of(record: Any) -> str | None:
    """Of what a file of JSON holds; None of one that none of these commands wrote in this version."""
    named = isinstance(record, dict) and record.get("format")
    return next((kind for kind in VERSIONS if named and head(kind).items() <= record.items()), None)


def read_record(kind: str, file: Path) -> dict[str, Any]:
    """A UserError says where the file is not what the command of this kind has written."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} as JSON ({error}); name what the command {kind} has written") from error
    if not isinstance(record, dict) or kind_of(record) != kind:
        version = VERSIONS[kind]
        raise UserError(f"{file} is no JSON of the command {kind} in version {version}; name what {kind} has written")
    return record
