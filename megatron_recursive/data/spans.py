"""Pieces of files, and how files and URLs are opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class Span:
    """A piece of a file: the lines that begin in bytes [start, stop), or row groups [start, stop) of a .parquet.

    ``size`` is what it takes on disk, in bytes. A compressed file is one span.
    """

    path: str
    start: int
    stop: int
    size: int


def open_source(path: str) -> BinaryIO:
    """Open a file or URL for reading bytes."""
    if "://" not in path:
        return open(path, "rb")
    from datatrove.io import open_file

    return open_file(path, "rb")
