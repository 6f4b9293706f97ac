"""Which files an ``--input`` names, and how they are cut into parts that can be read at the same time."""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_recursive.command_line import missing_package
from megatron_recursive.data.hub import HubChoice, find_on_hub
from megatron_recursive.data.parquet import row_group_sizes
from megatron_recursive.data.spans import Span
from megatron_recursive.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".bz2")
_LINES = (".jsonl", ".json", ".txt")
SUFFIXES = (*(kind + packed for kind in _LINES for packed in ("", *COMPRESSIONS)), ".parquet")
KINDS = ".txt, .jsonl or .json (also .gz, .zst, .bz2) or .parquet"
_NO_DOCUMENTS = (
    ".idx.json", "/tokenizer.json", "/tokenizer_config.json", "/special_tokens_map.json", "/vocab.json", "/config.json",
    "/dataset_info.json", "/dataset_infos.json", "/dataset_dict.json", "/state.json",
    "/merges.txt", "/added_tokens.json", "/generation_config.json", "/_mixture.json",
)  # fmt: skip

TEXT_DOCUMENT_BYTES = 4 * 2**20
"""A .txt file is one document; a longer one is cut at line ends into documents of about so many bytes."""
MIN_PART_BYTES, MAX_PART_BYTES = 2**20, 256 * 2**20
_PARTS = 128
_FOOTER_THREADS = 16


@dataclass(frozen=True)
class SourceFile:
    """A file to read. ``path`` is absolute or a URL; ``modified`` (ns, 0 for a URL) tells a changed file."""

    path: str
    size: int
    modified: int = 0


def find_files(
    inputs: Sequence[str | Path | SourceFile], hub: HubChoice | None = None, *, flag: str = "--input"
) -> list[SourceFile]:
    """Expand folders (recursively, in name order), patterns and URLs into the files below them that can be read.

    ``hf://NAME[@REVISION][/GLOB]`` is the data set NAME of the Hugging Face hub; other URLs are fsspec's. ``flag`` is
    what the user knows the inputs by.

    Raises:
        UserError: a path is missing, a file is of another kind, a folder holds none that can be read, or a data set has
            several configurations or splits of which ``hub`` chooses none.
    """
    try:
        return _find(inputs, hub)
    except UserError as error:
        raise UserError(str(error).replace("--input", flag)) from error


def _find(inputs: Sequence[str | Path | SourceFile], hub: HubChoice | None) -> list[SourceFile]:
    files: list[SourceFile] = []
    if hub is not None and not any(str(given).startswith("hf://") for given in inputs):
        raise UserError("--hf-config and --hf-split are for an --input hf://NAME; leave them out")
    for given in inputs:
        if isinstance(given, SourceFile):
            files.append(given)
            continue
        given = str(given)
        if given.startswith("hf://") and not given.startswith("hf://buckets/"):
            found = [SourceFile(*each) for each in find_on_hub(given, hub or HubChoice(), _holds_documents)]
        else:
            found = _find_remote(given) if "://" in given else _find_local(given)
        if not found:
            raise UserError(f"--input {given} holds no {KINDS} file; name a folder or file that does")
        files += found
    return files


def unpacked_name(path: str) -> str:
    """The path in lower case, without the ending that says how the file is compressed."""
    path = path.lower()
    return next((path.removesuffix(end) for end in COMPRESSIONS if path.endswith(end)), path)


def _holds_documents(path: str) -> bool:
    """Whether a file of a folder is taken; one that is named is by its suffix alone."""
    on_its_way = ".partial/" in path  # of preprocess, mix and the like
    return path.lower().endswith(SUFFIXES) and not on_its_way and not f"/{path}".endswith(_NO_DOCUMENTS)


def _find_local(given: str) -> list[SourceFile]:
    path = Path(given)
    if not path.exists() and glob.has_magic(given):
        names = sorted(glob.glob(given, recursive=True))
        return [file for name in names if os.path.isfile(name) and _holds_documents(name) for file in _find_local(name)]
    if not path.exists():
        raise UserError(f"--input {given} does not exist; name a {KINDS} file, or a folder of them")
    if path.is_dir():
        paths = sorted(each for each in path.rglob("*") if _holds_documents(str(each)) and each.is_file())
    elif path.name.lower().endswith(SUFFIXES):
        paths = [path]
    else:
        raise UserError(f"--input {given} is no {KINDS} file; convert or rename it")
    return [SourceFile(os.path.abspath(each), each.stat().st_size, each.stat().st_mtime_ns) for each in paths]


def _find_remote(given: str) -> list[SourceFile]:
    from datatrove.io import get_datafolder

    try:
        if given.lower().endswith(SUFFIXES):
            parent, _, name = given.rpartition("/")
            folder, names = get_datafolder(parent), [name]
        else:
            folder = get_datafolder(given)
            names = [name for name in folder.list_files() if _holds_documents(name)]
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


def default_part_bytes(files: Sequence[SourceFile]) -> int:
    """How large the parts are if nobody says: enough of them to spread, few enough to join."""
    return min(max(total_bytes(files) // _PARTS, MIN_PART_BYTES), MAX_PART_BYTES)


def plan_parts(files: Sequence[SourceFile], part_bytes: int, uncut: str = ".parquet") -> list[list[Span]]:
    """Cut the files into parts of about ``part_bytes``, in their order; each part is read by one process.

    A file of up to twice that size stays whole. The parts depend on the files alone, so that an interrupted run can go
    on with another number of workers. A file that ends in ``uncut`` stays whole too.

    Raises:
        UserError: a .parquet file cannot be read.
    """
    footers = [file for file in files if file.path.lower().endswith(".parquet") and file.size > 2 * part_bytes]
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:  # over a network each takes a moment of waiting
        sizes = dict(zip(footers, threads.map(_row_groups, footers), strict=True))
    parts: list[list[Span]] = []
    filled = part_bytes
    for file in files:
        for span in _cut(file, part_bytes, sizes.get(file), uncut):
            if filled >= part_bytes:
                parts.append([])
                filled = 0
            parts[-1].append(span)
            filled += span.size
    return parts


@functools.lru_cache(maxsize=2**16)
def _row_groups(file: SourceFile) -> tuple[int, ...]:
    return tuple(row_group_sizes(file.path))


def _cut(file: SourceFile, part_bytes: int, row_groups: Sequence[int] | None, uncut: str) -> Iterator[Span]:
    if row_groups is not None:
        yield from _cut_table(file, part_bytes, row_groups)
    elif file.path.lower().endswith((*COMPRESSIONS, ".parquet", uncut)) or file.size <= 2 * part_bytes:
        yield whole(file)
    else:
        if file.path.lower().endswith(".txt"):  # whole documents
            part_bytes = -(-part_bytes // TEXT_DOCUMENT_BYTES) * TEXT_DOCUMENT_BYTES
        for start in range(0, file.size, part_bytes):
            stop = min(start + part_bytes, file.size)
            yield Span(file.path, start, stop, stop - start)


def _cut_table(file: SourceFile, part_bytes: int, row_groups: Sequence[int]) -> Iterator[Span]:
    start = filled = 0
    for number, size in enumerate(row_groups):
        filled += size
        if filled >= part_bytes or number == len(row_groups) - 1:
            yield Span(file.path, start, number + 1, filled)
            start, filled = number + 1, 0


def whole(file: SourceFile) -> Span:
    """The span of a file that is read by one process; of a .parquet, all row groups."""
    return Span(file.path, 0, None if file.path.lower().endswith(".parquet") else file.size, file.size)
