"""Damaged checkpoints: Megatron's SHA-256 manifest of every file, checked wherever it is found and told in a sentence.

Megatron 0.19 writes ``integrity.json`` last under ``--verify-integrity``, and can compare it before a load. Without it
a flipped bit is a weight like any other. The hashing, both ways, is Megatron's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from megatron.core.dist_checkpointing import validation
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_recursive.errors import UserError
from megatron_recursive.models.stored_arguments import TRACKER

LIMIT_BYTES = 10 * 10**9
"""Up to this size a checkpoint is given a manifest unasked: one core hashes about 1.4 GB a second."""
MANIFEST = validation.INTEGRITY_FNAME
NON_PERSISTENT = "non_persistent"  # Megatron's folder for passing checkpoints, below that of the others
COMPLETE = "metadata.json"  # Megatron writes it last but for the manifest: a save that was cut short has none


def check_integrity(folder: Path, *, needed: bool = False) -> None:
    """Hash every file that the manifest of an iteration's folder names; without a manifest there is nothing to check.

    Every rank calls it, and the first one reads. ``needed`` refuses a folder without a manifest.

    Raises:
        UserError: a file is missing or is not what was saved; says which checkpoint to take instead.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if needed:
            raise UserError(f"--verify-integrity: {manifest} does not exist; leave the flag out to load it unchecked.")
        return
    try:
        dict(json.loads(manifest.read_bytes())["files"])
        validation.verify_integrity_manifest(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # on every rank alike
        raise UserError(f"{manifest} is damaged ({type(error).__name__}); {advise_other(folder)}.") from error
    except CheckpointingException as error:
        bad = [str(folder / name) for name in re.findall(r"^  (.+?): (?:hash|file)", str(error), re.MULTILINE)]
        what = f"{', '.join(bad)} is damaged or missing (by the SHA-256 in {MANIFEST})"
        why = what if bad else " ".join(str(error).split())[:200]
        raise UserError(f"The checkpoint {folder} cannot be used: {why}; {advise_other(folder)}.") from error


def write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """Give a complete iteration's folder its manifest, unless it is larger than ``LIMIT_BYTES``.

    ``known`` are the digests of files that need not be read for it, by name.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    if sum(file.stat().st_size for file in files) <= LIMIT_BYTES:
        digests = {file.name: known.get(file.name) or validation._compute_file_hash(str(file)) for file in files}
        text = json.dumps({"algorithm": validation._HASH_ALGORITHM, "files": digests}, indent=2)
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def complete_iterations(root: Path) -> list[int]:
    """The iterations below a checkpoint root whose save came to its end, in order."""
    return sorted(int(file.parent.name.removeprefix("iter_")) for file in root.glob(f"iter_[0-9]*/{COMPLETE}"))


def advise_other(folder: Path) -> str:
    """Which checkpoint to take instead of one that cannot be read: the last whose files are what was saved."""
    root = folder.parent
    kept = root.parent if root.name == NON_PERSISTENT else root
    found = [(iteration, place) for place in (kept / NON_PERSISTENT, kept) for iteration in complete_iterations(place)]
    for iteration, place in sorted(found, key=lambda each: each[0], reverse=True):
        other = place / f"iter_{iteration:07d}"
        if other != folder and _is_good(other):
            track = f"write that number into {TRACKER}, or " if place == root == kept else ""
            return (
                f"the last good one beside it is {iteration}: {track}give --ckpt-step {iteration} to a run or {other} "
                "to a tool"
            )
    return f"{root} holds no other good checkpoint"


def _is_good(folder: Path) -> bool:
    """Whether a complete checkpoint's files are those of its manifest, where it has one. Not a collective."""
    try:
        if (folder / MANIFEST).is_file():
            validation._verify_integrity_manifest_impl(str(folder))
    except (CheckpointingException, OSError, ValueError, KeyError, AttributeError):
        return False
    return True
