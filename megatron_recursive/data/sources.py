"""Which files an ``--input`` names, and how they are cut into parts that can be read at the same time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_recursive.command_line import missing_package
from megatron_recursive.data.parquet import row_group_sizes
from megatron_recursive.data.spans import Span
from megatron_recursive.errors import UserError

COMPRESSIONS = (".gz", ".zst")
SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".txt") for packed in ("", *COMPRESSIONS)) + (".parquet",)
KINDS = ".txt or .jsonl (also .gz, .zst) or .parquet"

TEXT_DOCUMENT_BYTES = 4 * 2**20
"""A .txt file is one document; a longer one is cut at line ends into documents of about so many bytes."""
MIN_PART_BYTES, MAX_PART_BYTES = 2**20, 256 * 2**20
_PARTS = 128


@dataclass(frozen=True)
class SourceFile:
    """A file to read. ``path`` is absolute or a URL; ``modified`` (ns, 0 for a URL) tells a changed file."""

    path: str
    size: int
    modified: int = 0


def find_files(inputs: Sequence[str | Path]) -> list[SourceFile]:
    """Expand folders (recursively, in name order) and URLs into the files below them that can be read.

    ``hf://NAME`` is the data set NAME of the Hugging Face hub, or a folder in it; other URLs are fsspec's.

    Raises:
        UserError: a path is missing, a file is of another kind, or a folder holds none that can be read.
    """
    files: list[SourceFile] = []
    for given in map(str, inputs):
        found = _find_remote(given) if "://" in given else _find_local(given)
        if not found:
            raise UserError(f"--input {given} holds no {KINDS} file; name a folder or file that does")
        files += found
    return files


def _find_local(given: str) -> list[SourceFile]:
    path = Path(given)
    if not path.exists():
        raise UserError(f"--input {given} does not exist; name a {KINDS} file, or a folder of them")
    if path.is_dir():
        paths = sorted(each for each in path.rglob("*") if each.name.endswith(SUFFIXES) and each.is_file())
    elif path.name.endswith(SUFFIXES):
        paths = [path]
    else:
        raise UserError(f"--input {given} is no {KINDS} file; convert or rename it")
    return [SourceFile(os.path.abspath(each), each.stat().st_size, each.stat().st_mtime_ns) for each in paths]


def _find_remote(given: str) -> list[SourceFile]:
    from datatrove.io import get_datafolder

    url = given
    if url.startswith("hf://") and not url.startswith(("hf://datasets/", "hf://buckets/")):
        url = f"hf://datasets/{url.removeprefix('hf://')}"
    try:
        if url.endswith(SUFFIXES):
            parent, _, name = url.rpartition("/")
            folder, names = get_datafolder(parent), [name]
        else:
            folder = get_datafolder(url)
            names = [name for name in folder.list_files() if name.endswith(SUFFIXES)]
        return [SourceFile(str(folder.resolve_paths(name)), folder.size(name)) for name in names]
    # Each file system raises its own errors, of missing packages, names, rights and networks.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise UserError(f"--input {given} cannot be listed ({reason}); check the name and the network") from error


def require_packages(*names: str) -> None:
    """Refuse to start without the packages of the extra ``data``.

    Raises:
        UserError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name)


def total_bytes(files: Sequence[SourceFile]) -> int:
    """Size of the files together on disk, in bytes."""
    return sum(file.size for file in files)


def plan_parts(files: Sequence[SourceFile], part_bytes: int | None = None) -> list[list[Span]]:
    """Cut the files into parts of about ``part_bytes``, in their order; each part is read by one process.

    The parts depend on the files alone, so that an interrupted run can go on with another number of workers.

    Raises:
        UserError: a .parquet file cannot be read.
    """
    if part_bytes is None:
        part_bytes = min(max(total_bytes(files) // _PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
    parts: list[list[Span]] = []
    filled = part_bytes
    for file in files:
        for span in _cut(file, part_bytes):
            if filled >= part_bytes:
                parts.append([])
                filled = 0
            parts[-1].append(span)
            filled += span.size
    return parts


def _cut(file: SourceFile, part_bytes: int) -> Iterator[Span]:
    if file.path.endswith(COMPRESSIONS):
        yield whole(file)
        return
    if file.path.endswith(".parquet"):
        yield from _cut_table(file, part_bytes)
        return
    if file.path.endswith(".txt"):  # whole documents
        part_bytes = -(-part_bytes // TEXT_DOCUMENT_BYTES) * TEXT_DOCUMENT_BYTES
    for start in range(0, file.size, part_bytes):
        stop = min(start + part_bytes, file.size)
        yield Span(file.path, start, stop, stop - start)


def _cut_table(file: SourceFile, part_bytes: int) -> Iterator[Span]:
    sizes = row_group_sizes(file.path)
    start = filled = 0
    for number, size in enumerate(sizes):
        filled += size
        if filled >= part_bytes or number == len(sizes) - 1:
            yield Span(file.path, start, number + 1, filled)
            start, filled = number + 1, 0


def whole(file: SourceFile) -> Span:
    """The span of a file that is read by one process; of a .parquet, all row groups."""
    if file.path.endswith(".parquet"):
        return Span(file.path, 0, len(row_group_sizes(file.path)), file.size)
    return Span(file.path, 0, file.size, file.size)
