"""Output files that appear under their final names only when they are complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError


class CannotWrite(UserError):
    """An output that cannot be written; its cause is the OSError."""


@contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Yield one temporary path beside each target, and rename them in the order given when the block succeeds.

    A block that fails leaves the targets as they were; a killed process leaves only ``*.partial-PID`` files.

    Raises:
        CannotWrite: a folder cannot be made or a file cannot be written (permissions, full disk).
    """
    partials = [_partial(target) for target in targets]
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield partials
        for partial in partials:
            sync(partial)
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
    except OSError as error:
        raise cannot_write(targets[0], error) from error
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()


def write_json(target: Path, record: Any) -> None:
    with replacing(target) as (partial,):
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, and rename it when the block succeeds.

    A folder that exists already keeps its other files; those of the same names are replaced one by one.

    Raises:
        CannotWrite: the folder cannot be made or written (permissions, full disk, a file of that name).
    """
    partial = _partial(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.is_dir():
            for file in sorted(partial.iterdir()):
                os.replace(file, target / file.name)
        else:
            os.rename(partial, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(target: Path) -> Path:
    # The process id keeps two runs with the same output from writing into one file.
    return target.with_name(f"{target.name}.partial-{os.getpid()}")


def sync(path: Path) -> None:
    """Wait until a file is on disk: a power cut after a rename could else leave the final name on an empty file."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def cannot_write(target: Path, error: OSError) -> CannotWrite:
    """The sentence for an output that cannot be written."""
    return CannotWrite(f"cannot write {target} ({error.strerror or error}); mend that, or choose another place")
