"""Progress of long reads: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

INTERVAL_S = 10.0  # between two plain lines, when stderr is no terminal
_COUNTS = struct.Struct("<QQ")


def steps[Item](items: Sequence[Item], label: str, done: int = 0) -> Iterator[Item]:
    """The items, and on stderr how many are done, their rate and the time left: a bar, or a line at intervals.

    ``done``: by an earlier run.
    """
    total, start = done + len(items), time.monotonic()
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, label, total=total, initial=done, unit="batch")
        return
    shown = start
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= INTERVAL_S or (count == len(items) and shown > start):
            rate, shown = count / (now - start), now
            left = int((len(items) - count) / rate)
            print(f"{label}: {done + count} of {total} batches, {rate:.3g}/s, {left // 60}:{left % 60:02d} left",
                  file=sys.stderr, flush=True)  # fmt: skip


def note_count(file: Path, rank: int, documents: int, size: int) -> None:
    """Write down how many documents and bytes of part ``rank`` are read: 16 bytes in a file that all parts share."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as stream:
        os.pwrite(stream.fileno(), _COUNTS.pack(documents, size), rank * _COUNTS.size)


def read_counts(file: Path) -> tuple[int, int]:
    """Documents and bytes of all parts together."""
    raw = file.read_bytes() if file.exists() else b""
    counts = list(_COUNTS.iter_unpack(raw[: len(raw) // _COUNTS.size * _COUNTS.size]))
    return sum(documents for documents, _ in counts), sum(size for _, size in counts)


class Progress:
    """Shows bytes and documents read, their rates, and the time left, on stderr.

    Args:
        label: the first word of the bar or line, such as ``encoding``.
        total_bytes: bytes that will be read in all.
        done_bytes: bytes that were read by an earlier run; they do not count in the rates.
        things: what is counted beside the bytes.
    """

    def __init__(self, label: str, total_bytes: int, done_bytes: int = 0, things: str = "documents") -> None:
        self.label, self.total_bytes, self.done_bytes, self.things = label, total_bytes, done_bytes, things
        self.documents = self.bytes = 0
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = self._shown = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total_bytes, initial=self.done_bytes, desc=self.label, unit="B", unit_scale=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, documents: int, size: int) -> None:
        """Count ``documents`` more documents, which took ``size`` bytes on disk."""
        self.documents += documents
        self.bytes += size
        if self._bar is not None:
            rate = self.documents / max(time.monotonic() - self._start, 1e-3)
            self._bar.set_postfix_str(f"{self.documents:,} {self.things}, {rate:,.0f}/s", refresh=False)
            self._bar.update(size)
        elif time.monotonic() - self._shown >= INTERVAL_S:
            self._shown = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        seconds = self._shown - self._start
        rate = self.bytes / seconds
        if not rate:
            print(f"{self.label}: starting", file=sys.stderr, flush=True)
            return
        left = max(self.total_bytes - self.done_bytes - self.bytes, 0) / rate
        print(
            f"{self.label}: {(self.done_bytes + self.bytes) / 1e6:.1f} of {self.total_bytes / 1e6:.1f} MB, "
            f"{self.documents:,} {self.things}, {self.documents / seconds:,.0f} {self.things}/s, "
            f"{rate / 1e6:.2f} MB/s, "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
            file=sys.stderr,
            flush=True,
        )
