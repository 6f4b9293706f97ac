"""Megatron's indexed datasets: token ids in ``PREFIX.bin``, where each document lies in ``PREFIX.idx``."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType

from megatron_recursive.data.files import replacing
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.readers import find_input_files, iter_documents, total_bytes
from megatron_recursive.data.tokenizer import encode_documents, id_range, load_tokenizer
from megatron_recursive.errors import UserError

# Layout of an .idx (megatron/core/datasets/indexed_dataset.py): magic, version, type code, sequences, documents; then
# int32 lengths, int64 byte offsets, int64 document bounds, and int8 modes in a multimodal dataset.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_REMOTE = ("s3://", "msc://")


@dataclass(frozen=True)
class IndexedSummary:
    """What :func:`preprocess` wrote; tokens include the end-of-document tokens."""

    bin_file: Path
    idx_file: Path
    documents: int
    tokens: int


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer_folder: str | Path,
    json_key: str = "text",
    workers: int = 1,
    append_eod: bool = True,
) -> IndexedSummary:
    """Tokenize documents into ``PREFIX.bin`` and ``PREFIX.idx``; the files do not depend on ``workers``.

    ``.idx`` is renamed into place last, so that its presence proves the pair complete.

    Raises:
        UserError: an input is missing, empty or malformed, the tokenizer is missing or has no end-of-document token,
            or the files cannot be written.
    """
    bin_file, idx_file = _output_files(str(prefix))
    if workers < 1:
        raise UserError(f"--workers {workers} is not a number of processes; give 1 or more")
    files = find_input_files(inputs)
    tokenizer = load_tokenizer(tokenizer_folder)
    if append_eod and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {tokenizer_folder} has no eos_token; set one or pass --no-append-eod")
    suffix = [tokenizer.eos_token_id] if append_eod else []
    documents = tokens = 0
    encoded = encode_documents(iter_documents(files, json_key), tokenizer, workers)
    with closing(encoded), replacing(bin_file, idx_file) as (partial_bin, partial_idx):
        # Read and encode something first: a mistake in the first lines is then reported before the slow import.
        first = next(encoded, None)
        if first is None:
            raise UserError(f"--input {' '.join(map(str, inputs))} holds no text; name files with documents in them")
        megatron = _megatron_indexed_dataset()
        dtype = megatron.DType.optimal_dtype(id_range(tokenizer))
        builder = megatron.IndexedDatasetBuilder(str(partial_bin), dtype=dtype)
        with Progress("encoding", total_bytes(files)) as progress:
            for batch in chain([first], encoded):
                for ids in batch.ids:
                    if ids:
                        builder.add_document(ids + suffix, [len(ids + suffix)])
                        documents += 1
                        tokens += len(ids + suffix)
                progress.advance(len(batch.ids), batch.size)
        builder.finalize(str(partial_idx))
        # An old .idx must not stand beside a new .bin, not even for a moment.
        idx_file.unlink(missing_ok=True)
    return IndexedSummary(bin_file, idx_file, documents, tokens)


def check_indexed_dataset(prefix: str | Path) -> None:
    """Refuse an indexed dataset that is missing or half-written.

    Reads the index's header and last entry only, whatever the size of the dataset. Prefixes in object storage
    (``s3://``, ``msc://``) are not checked.

    Raises:
        UserError: a file is missing, empty, no Megatron dataset, or of a size that does not agree with the index.
    """
    if str(prefix).startswith(_REMOTE):
        return
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    again = "write it again with tools/preprocess_data.py"
    for file in (bin_file, idx_file):
        if not file.is_file():
            raise UserError(f"the dataset file {file} does not exist; {_mend_missing(str(prefix), again)}")
    try:
        expected, found = _bytes_promised(idx_file, again), bin_file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {idx_file} ({error.strerror}); mend its permissions") from error
    if found != expected:
        raise UserError(f"{bin_file} has {found:,} bytes but {idx_file.name} promises {expected:,}; {again}")


def _bytes_promised(idx_file: Path, again: str) -> int:
    size = idx_file.stat().st_size
    with open(idx_file, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise UserError(f"{idx_file} is cut off after {size} bytes; {again}")
        magic, version, code, sequences, bounds = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or code not in _TOKEN_BYTES:
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
    return last_offset + last_length * _TOKEN_BYTES[code]


def _mend_missing(prefix: str, again: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            return f"give the prefix without {suffix}"
    return f"mend the path, or {again}"


def _output_files(prefix: str) -> tuple[Path, Path]:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            raise UserError(f"--output {prefix} is a file name; give the prefix without {suffix}")
    if prefix.endswith("/"):
        raise UserError(f"--output {prefix} is a folder; give a prefix in it, such as {prefix}train")
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _megatron_indexed_dataset() -> ModuleType:
    # Imported late (it takes ten seconds) and quietly: it warns of GPU libraries that nothing here uses.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        logging.disable(logging.NOTSET)
    return indexed_dataset
