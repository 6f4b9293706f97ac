"""Output folders of the converter: room checked first, written beside, renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_recursive.errors import UserError

SPARE_BYTES = 32 * 2**20  # for configs, tokenizer, report, and the pieces' own headers


@contextmanager
def new_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a folder beside ``target`` that takes its name when the block succeeds, and vanishes when it fails.

    Raises:
        UserError: the target exists and is not empty, the disk has no room, or the folder cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"The output {target} exists already; name a new folder.")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes + SPARE_BYTES:
            raise UserError(
                f"The output {target} needs {(needed_bytes + SPARE_BYTES) / 1e9:.2f} GB, but its disk has "
                f"{free / 1e9:.2f} GB left; name a folder on another one."
            )
        partial.mkdir()
        yield partial
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"The output {target} cannot be written ({reason}); name another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_generation_settings(folder: Path) -> None:
    """Refuse a generation_config.json that is none: transformers would go on without it."""
    if (folder / "generation_config.json").is_file():
        check_settings(folder / "generation_config.json")


def check_settings(file: Path) -> None:
    """A JSON object, in which every token id (or list of them) is one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({' '.join(str(error).split())[:100]}); mend or delete it.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object; mend or delete it.")
    for name, value in values.items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and value is not None and any(type(x) is not int or x < 0 for x in ids):
            raise UserError(f"{file} has {name} {value!r}, which is no token id; mend or delete it.")
