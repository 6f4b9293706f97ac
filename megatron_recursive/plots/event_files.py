"""Runs of which TensorBoard's event files or W&B tell, in records as metrics.jsonl has them.

They hold losses by iteration, as Megatron logs them; neither tokens nor FLOPs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError

ONLINE = "wandb:"  # ENTITY/PROJECT/RUN behind it
BLOCK, HEAD = 32 * 1024, 7  # bytes of a block of W&B's file, and before each of its records
Value = tuple[int, str, Any]  # step, name and value


def find_events(path: Path) -> Path | None:
    """A file or folder of events, W&B's file in a folder of its own, or the name of a run online; or else None."""
    if str(path).startswith(ONLINE) or path.suffix == ".wandb" or "tfevents" in path.name:
        return path
    if any(path.glob("events.out.tfevents.*")):
        return path
    return next(path.glob("run-*.wandb"), None)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records of a run by iteration. A UserError says what cannot be read."""
    online = str(path).startswith(ONLINE)
    if not (online or path.exists()):
        raise UserError(f"cannot read {path} (No such file or directory); name a run that is there")
    values = _online(path) if online else _offline(path) if path.suffix == ".wandb" else _tensorboard(path)
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for step, name, value in values:
        if isinstance(value, int | float) and not name.startswith("_") and not name.endswith((" vs samples", " ppl")):
            kind = "valid" if name.endswith(" validation") else "train"
            record = records.setdefault((step, kind), {"kind": kind, "iteration": step})
            record.setdefault(name.removesuffix(" validation"), value)  # a test at the end is logged behind it
    return [records[key] for key in sorted(records)]


def _tensorboard(path: Path) -> Iterator[Value]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    for name in events.Tags()["scalars"]:
        yield from ((event.step, name, event.value) for event in events.Scalars(name))


def _online(path: Path) -> Iterator[Value]:
    import wandb

    try:
        for row in wandb.Api().run(str(path).removeprefix(ONLINE)).scan_history():
            yield from ((row["_step"], name, value) for name, value in row.items())
    except (wandb.errors.Error, ValueError, OSError) as error:
        said = str(error).split("\n")[0]
        raise UserError(f"W&B does not tell of {path} ({said}); give {ONLINE}ENTITY/PROJECT/RUN") from error


def _offline(path: Path) -> Iterator[Value]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    if not data.startswith(b":W&B"):
        raise UserError(f"{path} is no file of W&B; name the folder of an offline run")
    for part in _parts(data):
        history = Record.FromString(part).history
        for item in history.item:
            yield history.step.num, item.key or "/".join(item.nested_key), json.loads(item.value_json)


def _parts(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: checksum, length and type, 1 whole, or 2 first, 3 middle and 4 last."""
    at, part = HEAD, b""  # the file has a head of as many bytes
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4) and at <= len(data):
            yield part
            part = b""
