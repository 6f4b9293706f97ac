"""Pieces of files, and how files and URLs are opened: a read that fails is tried again where it stopped."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_recursive.errors import UserError

ATTEMPTS, WAIT_S = 5, 1.0
"""How often an input is tried, and for how long the first pause is; each is twice the one before."""
_BUFFER = 2**18
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Span:
    """A piece of a file: the lines that begin in bytes [start, stop), or row groups [start, stop) of a .parquet.

    ``stop`` is None for a .parquet to its end. ``size`` is what it takes on disk, in bytes. A compressed file is one
    span.
    """

    path: str
    start: int
    stop: int | None
    size: int


def open_source(path: str) -> BinaryIO:
    """Open a file or URL for reading bytes.

    Reading raises a UserError once :data:`ATTEMPTS` tries have failed.
    """
    return io.BufferedReader(_Insisting(path), _BUFFER)


def insist[Result](name: str, act: Callable[[], Result], mend: str = "mend it or leave it out") -> Result:
    """What ``act`` returns; errors of files and networks are waited out, since both recover.

    Raises:
        UserError: every try failed, or the first one in a way that lasts.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        # Each file system of fsspec has errors of its own; Python's others (TypeError, ...) are defects of ours.
        except Exception as error:
            if isinstance(error, UserError) or not (isinstance(error, OSError) or _is_foreign(error)):
                raise
            status = getattr(getattr(error, "response", None), "status_code", 500)
            lasting = isinstance(error, (*_LASTING, ValueError)) or (400 <= status < 500 and status not in (408, 429))
            lasting = lasting or type(error).__name__ == "OfflineModeIsEnabled"  # the hub's, by the user's wish
            if lasting or attempt == ATTEMPTS:
                tries = "" if lasting else f" at {ATTEMPTS} tries"
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                short = " ".join(str(reason).split())[:200].rstrip(".")
                raise UserError(f"{name} cannot be read{tries} ({short}); {mend}") from error
        time.sleep(WAIT_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _is_foreign(error: Exception) -> bool:
    return type(error).__module__ != "builtins"


class _Insisting(io.RawIOBase):
    """A file or URL that is opened again, where it stood, when reading it fails."""

    def __init__(self, path: str) -> None:
        self._path, self._position = path, 0
        self._stream: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = self._do(lambda stream: stream.seek(offset, whence))
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = self._do(lambda stream: stream.readinto(buffer))
        self._position += count
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _do(self, act: Callable[[Any], int]) -> int:
        def attempt() -> int:
            try:
                if self._stream is None:
                    self._stream = _open(self._path)
                    self._stream.seek(self._position)
                return act(self._stream)
            except Exception:
                self._drop()
                raise

        return insist(self._path, attempt)

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        with suppress(Exception):  # whatever closing a broken connection says
            if stream is not None:
                stream.close()


def _open(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb", buffering=0)
    from fsspec.core import url_to_fs

    system, name = url_to_fs(path)
    return system.open(name, "rb")
