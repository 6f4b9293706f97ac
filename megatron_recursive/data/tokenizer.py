"""Byte-level BPE tokenizers in Hugging Face's folder format: training, loading, and encoding in parallel."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_recursive.data.files import replacing_folder
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.readers import Document, find_input_files, iter_documents, total_bytes
from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
MIN_VOCAB_SIZE = 300
"""256 bytes, two special tokens, and a few merges."""

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 2**20
_BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class TrainedTokenizer:
    """What :func:`train_tokenizer` wrote; ``vocab_size`` is below the one asked for if the corpus has too few pairs."""

    folder: Path
    vocab_size: int
    documents: int
    characters: int


def train_tokenizer(
    inputs: Sequence[str | Path], output: str | Path, vocab_size: int, json_key: str = "text"
) -> TrainedTokenizer:
    """Train a byte-level BPE and write it as a folder that ``transformers.AutoTokenizer`` loads.

    ``<|endoftext|>``, token 0, ends and begins documents; ``<|pad|>``, token 1, is apart from it, because Megatron's
    datasets take no loss on padding. The same input gives the same folder.

    Raises:
        UserError: the vocabulary is too small, an input is missing, empty or malformed, or the folder is not writable.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size} is too small for the 256 bytes; give at least {MIN_VOCAB_SIZE}")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    files = find_input_files(inputs)

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    characters = 0

    def texts(progress: Progress) -> Iterator[str]:
        nonlocal characters
        for document in iter_documents(files, json_key):
            characters += len(document.text)
            progress.advance(1, document.size)
            yield document.text
        print(f"learning {vocab_size:,} tokens ...", file=sys.stderr, flush=True)

    with Progress("reading", total_bytes(files)) as progress:
        tokenizer.train_from_iterator(texts(progress), trainer)
    if not characters:
        raise UserError(f"--input {' '.join(map(str, inputs))} holds no text; name files with documents in them")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PADDING
    )
    with replacing_folder(output) as partial:
        fast.save_pretrained(partial)
    return TrainedTokenizer(output, len(fast), progress.documents, characters)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder; nothing is downloaded and no code of the folder is run.

    Raises:
        UserError: the folder is missing or holds no tokenizer that ``transformers`` can load.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist; make one with tools/train_tokenizer.py")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{folder} holds no tokenizer (no tokenizer.json); make one with tools/train_tokenizer.py")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # transformers and the Rust tokenizers raise bare Exception, ValueError, KeyError and OSError for a broken folder.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the tokenizer in {folder} ({reason}); make it again with tools/train_tokenizer.py"
        ) from error


def id_range(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, which can exceed ``len(tokenizer)`` when ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of consecutive documents, and the bytes these took on disk."""

    ids: list[list[int]]
    size: int


def encode_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, workers: int
) -> Generator[EncodedBatch]:
    """Encode documents without adding special tokens, in their order whatever the number of workers.

    At most ``4 * workers`` batches are held at a time, so that the corpus need not fit into memory.

    Raises:
        UserError: a worker process was killed, usually for want of memory.
    """
    batches = _batches(documents)
    if workers == 1:
        for texts, size in batches:
            yield EncodedBatch([_encode(tokenizer, text) for text in texts], size)
        return
    # The first batch is read before any process starts: a mistake in the first lines is then reported at once.
    first = next(batches, None)
    if first is None:
        return
    pending: deque[tuple[Future[list[list[int]]], int]] = deque()
    # spawn, not fork: the caller may hold threads (torch, Rust), and a forked child can then wait for ever on a lock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        try:
            for texts, size in chain([first], batches):
                pending.append((pool.submit(_encode_in_worker, texts), size))
                if len(pending) >= _BATCHES_PER_WORKER * workers:
                    ids, done = pending.popleft()
                    yield EncodedBatch(ids.result(), done)
            while pending:
                ids, done = pending.popleft()
                yield EncodedBatch(ids.result(), done)
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, probably for want of memory; give a smaller --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    texts: list[str] = []
    characters = size = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        size += document.size
        if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts, size
            texts, characters, size = [], 0, 0
    if texts:
        yield texts, size


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: documents longer than the model's context are no mistake here, they are packed later.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


_worker_tokenizer: PreTrainedTokenizerBase | None = None


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers of a killed parent would wait for work for ever: each holds the writing end of its own queue open.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[list[int]]:
    assert _worker_tokenizer is not None
    return [_encode(_worker_tokenizer, text) for text in texts]
