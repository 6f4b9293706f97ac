"""Output folders of the converter: room checked first, written beside, renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_recursive.errors import UserError

SPARE_BYTES = 32 * 2**20  # for configs, tokenizer, report, and the pieces' own headers

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@contextmanager
def new_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a folder beside ``target`` that takes its name when the block succeeds, and vanishes when it fails.

    Raises:
        UserError: the target exists and is not empty, the disk has no room, or the folder cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {target} exists already; name a new folder.")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes + SPARE_BYTES:
            raise UserError(
                f"--out {target} needs {(needed_bytes + SPARE_BYTES) / 1e9:.2f} GB, but its disk has "
                f"{free / 1e9:.2f} GB left; name a folder on another one."
            )
        partial.mkdir()
        yield partial
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {target} cannot be written ({reason}); name another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the files of a tokenizer (and the generation settings beside them); False where there is none."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not set(names) & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        return False
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return True
