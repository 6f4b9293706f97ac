"""Documents of .txt, .jsonl (.json) and .parquet files; a mistake is named by file and line."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_recursive.data.parquet import DamagedTableError, read_rows, read_table
from megatron_recursive.data.sources import TEXT_DOCUMENT_BYTES, SourceFile, unpacked_name, whole
from megatron_recursive.data.spans import Span, open_source
from megatron_recursive.errors import UserError

Reject = Callable[[UserError], None]
"""Is given each malformed document; may raise the error, which ends the reading, or count it."""

_CHUNK = 2**18
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Document:
    """One document: its text, and the bytes it took on disk (for progress)."""

    text: str
    size: int


def refuse(error: UserError) -> None:
    """The :data:`Reject` that ends the reading."""
    raise error


def iter_documents(files: Sequence[SourceFile], json_key: str = "text", reject: Reject = refuse) -> Iterator[Document]:
    """Yield the documents of whole files in order; see :func:`read_span`."""
    for file in files:
        yield from read_span(whole(file), json_key, reject)


def read_span(span: Span, json_key: str = "text", reject: Reject = refuse) -> Iterator[Document]:
    """Yield the documents of a span: a .jsonl or .json line or a .parquet row each, or a .txt file.

    Documents of white space only are left out. One that is not UTF-8 or JSON, or has no string under ``json_key``, goes
    to ``reject`` as an error that names file and line.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    if span.path.lower().endswith(".parquet"):
        pairs = read_rows(span, json_key, reject)
    elif unpacked_name(span.path).endswith(".txt"):
        pairs = _read_text(span, reject)
    else:
        pairs = _read_lines(span, json_key, reject)
    for text, size in pairs:
        if not text.isspace() and text:
            yield Document(text, size)


def _read_lines(span: Span, json_key: str, reject: Reject) -> Iterator[tuple[str, int]]:
    import orjson

    number = 0
    try:
        with open_source(span.path) as stream:
            for number, (raw, size, _) in enumerate(_lines(stream, span), start=1):
                try:
                    text = orjson.loads(raw)[json_key]
                except (ValueError, KeyError, TypeError):
                    text = None
                if type(text) is str:
                    yield text, size
                elif not raw.isspace():
                    # The slow way tells what is wrong, and takes what only orjson refuses (NaN, a byte order mark).
                    where = f"{span.path}:{_lines_before(span) + number}"
                    try:
                        text = _text_of_line(raw, json_key, where)
                    except UserError as error:
                        reject(error)
                    else:
                        yield text, size
    except _DAMAGED as error:
        raise _damaged(f"{span.path}:{_lines_before(span) + number + 1}", error) from error


def _read_text(span: Span, reject: Reject) -> Iterator[tuple[str, int]]:
    """A document is made of the lines that begin in the same ``TEXT_DOCUMENT_BYTES`` of the (unpacked) file."""
    number, first, end = 0, 1, 0
    lines: list[bytes] = []
    size = 0

    def document() -> Iterator[tuple[str, int]]:
        raw = b"".join(lines)
        try:
            yield raw.decode("utf-8-sig"), size
        except UnicodeDecodeError as error:
            line = _lines_before(span) + first + raw.count(b"\n", 0, error.start)
            reject(UserError(f"{span.path}:{line} is not UTF-8; convert the file or leave it out"))

    try:
        with open_source(span.path) as stream:
            for number, (raw, taken, position) in enumerate(_lines(stream, span), start=1):
                if position >= end:
                    if lines:
                        yield from document()
                    lines, size, first = [], 0, number
                    end = (position // TEXT_DOCUMENT_BYTES + 1) * TEXT_DOCUMENT_BYTES
                lines.append(raw)
                size += taken
            if lines:
                yield from document()
    except _DAMAGED as error:
        raise _damaged(f"{span.path}:{_lines_before(span) + number + 1}", error) from error


def _lines(stream: BinaryIO, span: Span) -> Iterator[tuple[bytes, int, int]]:
    """(line with its end, bytes it took on disk, where it begins in the unpacked file) of the span's lines."""
    packed, position = _unpacked(stream, span.path), span.start
    if packed is not None:
        seen = 0
        for raw in packed:
            yield raw, stream.tell() - seen, position
            seen = stream.tell()
            position += len(raw)
        return
    if position:
        stream.seek(position - 1)
        position += len(stream.readline()) - 1
    stop = span.size if span.stop is None else span.stop
    if position < stop:
        for raw in stream:
            yield raw, len(raw), position
            position += len(raw)
            if position >= stop:
                return


@functools.lru_cache(maxsize=1)
def _lines_before(span: Span) -> int:
    """Lines that begin before the span, counted (once) when an error must name a line."""
    count, left = 0, span.start
    with open_source(span.path) as stream:
        while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
            last = chunk[-1:]
        if span.start and last != b"\n":
            count += 1
    return count


def _unpacked(stream: BinaryIO, path: str) -> BinaryIO | None:
    path = path.lower()
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if path.endswith(".bz2"):
        return bz2.BZ2File(stream)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstandard(stream), _CHUNK)
    return None


class _Zstandard(io.RawIOBase):
    """The bytes packed in a .zst file of one or more frames; the library's own reader takes a cut-off file for whole.

    Raises:
        EOFError: the file ends within a frame.
    """

    def __init__(self, stream: BinaryIO) -> None:
        import zstandard

        self._stream, self._frames = stream, zstandard.ZstdDecompressor()
        self._frame = self._frames.decompressobj()
        self._fresh = True  # nothing of the present frame was read yet
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            chunk = self._stream.read(_CHUNK) if not self._frame.eof else self._frame.unused_data
            if self._frame.eof:
                self._frame, self._fresh = self._frames.decompressobj(), True
                if not chunk:
                    chunk = self._stream.read(_CHUNK)
            if not chunk:
                if not self._fresh:
                    raise EOFError("it ends within a frame")
                return 0
            self._fresh = False
            self._left = self._frame.decompress(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _zstandard_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:  # without it no .zst file can be opened, and nothing raises its error
        return EOFError
    return zstandard.ZstdError


_DAMAGED = (OSError, EOFError, zlib.error, _zstandard_error())  # gzip and bz2 raise an OSError for what is not theirs


def _damaged(where: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{where} cannot be read ({reason.rstrip('.')}); mend the file or leave it out")


@dataclass(frozen=True)
class Record:
    """One object of JSON, or row of a table; ``number`` is its line or row, counted from where its span begins."""

    value: dict[str, Any]
    span: Span
    number: int
    size: int

    @property
    def place(self) -> str:
        """File and line. (To count the lines before a span takes time.)"""
        if self.span.path.lower().endswith(".parquet"):
            return f"{self.span.path}: row {self.number}"
        return f"{self.span.path}:{_lines_before(self.span) + self.number}"


def read_records(span: Span, keys: Sequence[str], reject: Reject) -> Iterator[Record]:
    """Yield the records of a span of .jsonl or .json lines, of a .json with one array, or of a .parquet.

    ``keys`` are the columns read of a table. What is malformed goes to ``reject``, the rest of a damaged file too.

    Raises:
        UserError: the file cannot be read.
    """
    if span.path.lower().endswith(".parquet"):
        try:
            for row, cells, size in read_table(span, lambda names: [name for name in names if name in keys]):
                yield Record({key: each for key, each in cells.items() if each is not None}, span, row, size)
        except DamagedTableError as error:
            reject(error)
        return
    import orjson

    number = 0
    try:
        with open_source(span.path) as stream:
            for number, (raw, size, _) in enumerate(_lines(stream, span), start=1):
                if number == 1 and raw[:9].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" and _is_json(span.path):
                    yield from _read_array(span, reject)
                    return
                value = None
                with suppress(ValueError):
                    value = orjson.loads(raw)
                try:
                    if type(value) is not dict and not raw.isspace():
                        value = _record_of_line(raw, f"{span.path}:{_lines_before(span) + number}", "messages")
                except UserError as error:
                    reject(error)
                else:
                    if value is not None:
                        yield Record(value, span, number, size)
    except _DAMAGED as error:
        reject(_damaged(f"{span.path}:{_lines_before(span) + number + 1}", error))


def _is_json(path: str) -> bool:
    return unpacked_name(path).endswith(".json")


def _read_array(span: Span, reject: Reject) -> Iterator[Record]:
    """The objects of one JSON array, which is held in memory. (What is not UTF-8 becomes half a surrogate pair.)"""
    with open_source(span.path) as stream:
        text = (_unpacked(stream, span.path) or stream).read().decode("utf-8-sig", "surrogateescape")
    decode, at, seen, line, follows = json.JSONDecoder().raw_decode, text.index("["), 0, 1, ","
    while follows == ",":
        at = behind_space(text, at + 1)
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, end = decode(text, at)
            at = behind_space(text, end)
            follows = text[at : at + 1]
            if follows not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            line += text.count("\n", seen, getattr(error, "pos", at))
            reject(UserError(f"{span.path}:{line} stops being valid JSON ({error}), the rest is not read; mend it"))
            return
        if isinstance(value, dict):
            yield Record(value, span, line, span.size * (end - seen) // len(text))
        else:
            reject(UserError(f"{span.path}:{line} is not a JSON object; write each conversation as one"))
    end = behind_space(text, at + 1)
    if end < len(text):
        line += text.count("\n", seen, end)
        reject(UserError(f"{span.path}:{line} goes on behind its array, which is not read; write one array"))


def behind_space(text: str, at: int) -> int:
    """Where the white space at a place of a text ends."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _text_of_line(raw: bytes, json_key: str, where: str) -> str:
    record = _record_of_line(raw, where, json_key)
    if json_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UserError(f"{where} has no key {json_key!r} (its keys: {keys}); name the text's key with --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} under {json_key!r}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # json accepts "\ud800"; a tokenizer does not
        raise UserError(f"{where} has half a surrogate pair under {json_key!r}; mend or remove the line") from error
    return text


def _record_of_line(raw: bytes, where: str, json_key: str) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; convert the file or remove the line") from error
    # RecursionError: thousands of nested brackets, which json refuses in this way.
    except (ValueError, RecursionError) as error:
        mend = "write a document a line, as jq -c '.[]' does" if raw.lstrip()[:1] == b"[" else "mend or remove the line"
        raise UserError(f"{where} is not valid JSON ({error}); {mend}") from error
    if not isinstance(record, dict):
        form = f"{{{json.dumps(json_key)}: ...}}, a line each (jq -c '.[]' does it for an array)"
        raise UserError(f"{where} is not a JSON object; write each document as {form}")
    return record
