"""Megatron's indexed datasets: token ids in ``PREFIX.bin``, where each document lies in ``PREFIX.idx``."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import command
from megatron_recursive.data.splits import unread_documents
from megatron_recursive.errors import UserError

# Layout of an .idx (megatron/core/datasets/indexed_dataset.py): magic, version, type code, sequences, documents; then
# int32 lengths, int64 byte offsets, int64 document bounds, and int8 modes in a multimodal dataset.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}  # as numpy names them: kind and bytes
_REMOTE = ("s3://", "msc://")
_SHORT_IDS = 65500
_PIECE = 2**16  # entries at a time


def check_indexed_dataset(prefix: str | Path, maker: str = "preprocess") -> None:
    """Refuse an indexed dataset that is missing or half-written.

    Reads the index's header and last entry only, whatever the size of the dataset. Prefixes in object storage
    (``s3://``, ``msc://``) are not checked. ``maker`` is the command that writes such data.

    Raises:
        UserError: a file is missing, empty, no Megatron dataset, or of a size that does not agree with the index.
    """
    if str(prefix).startswith(_REMOTE):
        return
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    again = f"write it again with {command(maker)}"
    for file in (bin_file, idx_file):
        if not file.is_file():
            raise UserError(f"the dataset file {file} does not exist; {_mend_missing(str(prefix), again)}")
    try:
        expected, found = _bytes_promised(idx_file, again), bin_file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {idx_file} ({error.strerror}); mend its permissions") from error
    if found != expected:
        raise UserError(f"{bin_file} has {found:,} bytes but {idx_file.name} promises {expected:,}; {again}")


def largest_sampled_id(prefix: str | Path, tokens: int = 2**20) -> int:
    """The largest token id among the first and the last so many of a checked dataset (-1: in object storage)."""
    if str(prefix).startswith(_REMOTE):
        return -1
    ids = _token_ids(prefix)
    return int(max(ids[:tokens].max(), ids[-tokens:].max()))


def _token_ids(prefix: str | Path) -> Any:
    import numpy

    with open(f"{prefix}.idx", "rb") as stream:
        code = _HEADER.unpack(stream.read(_HEADER.size))[2]
    return numpy.memmap(f"{prefix}.bin", _TOKEN_TYPES[code], "r")


def held_out_rows(
    prefix: str, samples: int, length: int, seed: int, trained: Mapping[str, Any], model: str
) -> Any:  # fmt: skip
    """Token ids [N, length + 1] of a dataset, each row's last token being the next one's first.

    Documents are those of :func:`unread_documents`, and lie as in one epoch of Megatron's training, which shuffles them
    by its --seed: with --full-validation its samples are these rows, in whatever order.

    Raises:
        UserError: it is no whole dataset, or has not enough tokens for one row.
    """
    import numpy

    check_indexed_dataset(prefix)
    ids = _token_ids(prefix)
    ends = numpy.cumsum(all_lengths(prefix), dtype="i8")
    documents = unread_documents(prefix, len(ends), trained, model)
    order = numpy.arange(documents.start, documents.stop, dtype="i4")
    tokens = int(ends[documents.stop - 1] - (ends[documents.start - 1] if documents.start else 0))
    numpy.random.RandomState(seed).shuffle(order)
    kept, left = list[Any](), min(samples, (tokens - 1) // length) * length + 1
    if left <= 1:
        what = prefix if len(documents) == len(ends) else f"what was held out of {prefix}"
        raise UserError(f"{what} has {tokens} tokens, fewer than one sample of --seq-length {length}; lower it.")
    for each in order:
        kept.append(ids[(ends[each - 1] if each else 0) : ends[each]][:left])
        left -= len(kept[-1])
        if not left:
            break
    rows = numpy.concatenate(kept).astype("i8")
    return numpy.stack([rows[at : at + length + 1] for at in range(0, len(rows) - 1, length)])


def token_type(id_range: int) -> str:
    """The type of the tokens in a ``.bin``, as numpy names it, which Megatron chooses too for ids below a bound."""
    return "u2" if id_range < _SHORT_IDS else "i4"


def write_index(file: Path, token: str, lengths: Callable[[], Iterable[Any]]) -> None:
    """Write the ``.idx`` of documents of one sequence each.

    Megatron's own writer holds several Python objects for a document, this one nothing: ``lengths`` gives the tokens of
    each document, as arrays of int32 of any size, each time that it is called.
    """
    import numpy

    (code,) = (code for code, name in _TOKEN_TYPES.items() if name == token)
    count = sum(len(piece) for piece in lengths())
    with open(file, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
        for piece in lengths():
            stream.write(numpy.asarray(piece, "<i4").tobytes())
        offset = 0
        for piece in lengths():
            ends = offset + numpy.cumsum(piece, dtype="<i8") * int(token[1])
            stream.write(numpy.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, _PIECE):
            stream.write(numpy.arange(start, min(start + _PIECE, count + 1), dtype="<i8").tobytes())


def read_lengths(file: Path) -> Iterator[Any]:
    """The tokens of each sequence of an ``.idx``, as arrays of int32."""
    import numpy

    with open(file, "rb") as stream:
        left = _HEADER.unpack(stream.read(_HEADER.size))[3]
        while left:
            yield numpy.fromfile(stream, "<i4", min(left, _PIECE))
            left -= min(left, _PIECE)


def all_lengths(prefix: str) -> Any:
    """The tokens of each document [N], int32."""
    import numpy

    return numpy.concatenate(list(read_lengths(Path(f"{prefix}.idx"))))


def _bytes_promised(idx_file: Path, again: str) -> int:
    size = idx_file.stat().st_size
    with open(idx_file, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise UserError(f"{idx_file} is cut off after {size} bytes; {again}")
        magic, version, code, sequences, bounds = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or code not in _TOKEN_TYPES:
            raise UserError(f"{idx_file} is not an index of Megatron token ids; {again}")
        expected = _HEADER.size + 12 * sequences + 8 * bounds
        if size not in (expected, expected + sequences):
            raise UserError(f"{idx_file} has {size:,} bytes but its header promises {expected:,}; {again}")
        if not sequences or not bounds:
            raise UserError(f"{idx_file} holds no document; {again} from a corpus with text")
        stream.seek(_HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (last_offset,) = struct.unpack("<q", stream.read(8))
        stream.seek(_HEADER.size + 12 * sequences + 8 * (bounds - 1))
        (last_bound,) = struct.unpack("<q", stream.read(8))
    if last_length < 0 or last_offset < 0 or last_bound != sequences:
        raise UserError(f"{idx_file} is damaged (its last entries are impossible); {again}")
    if last_offset + last_length == 0:
        raise UserError(f"{idx_file} holds no token; {again} from a corpus with text")
    return last_offset + last_length * int(_TOKEN_TYPES[code][1])


def _mend_missing(prefix: str, again: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            return f"give the prefix without {suffix}"
    return f"mend the path, or {again}"
