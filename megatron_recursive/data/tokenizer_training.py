"""Training of tokenizers: byte-level BPE in Hugging Face's folder format, and SentencePiece."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_recursive.data.files import replacing_folder
from megatron_recursive.data.hub import HubChoice
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.readers import iter_documents
from megatron_recursive.data.sources import SourceFile, find_files, require_packages, total_bytes
from megatron_recursive.errors import UserError

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
MIN_VOCAB_SIZE = 300
"""256 bytes, two special tokens, and a few merges."""
KINDS = ("bpe", "sentencepiece")

_PIECE_BYTES = 2**15  # SentencePiece leaves out longer lines, so that they are cut
_UTF8_BYTES = 4  # of a character, at most


@dataclass(frozen=True)
class TrainedTokenizer:
    """What :func:`train_tokenizer` wrote; ``vocab_size`` is below the one asked for if the corpus has too few pairs."""

    folder: Path
    vocab_size: int
    documents: int
    characters: int


def train_tokenizer(
    inputs: Sequence[str | Path], output: str | Path, vocab_size: int, json_key: str = "text", kind: str = "bpe",
    hub: HubChoice | None = None,
) -> TrainedTokenizer:  # fmt: skip
    """Train a tokenizer and write it into a folder; the same input gives the same folder.

    ``bpe``: byte-level, a folder that ``transformers.AutoTokenizer`` loads, with GPT-2's two files ``vocab.json`` and
    ``merges.txt`` beside it. ``<|endoftext|>``, token 0, ends and begins documents; ``<|pad|>``, token 1, is apart from
    it, because Megatron's datasets take no loss on padding.

    ``sentencepiece``: unigram with byte fallback, as ``tokenizer.model``; ``</s>`` ends documents.

    Raises:
        UserError: the vocabulary is too small or too large, an input is missing, empty or malformed, or the folder is
            not writable.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size} is too small for the 256 bytes; give at least {MIN_VOCAB_SIZE}")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    others = [] if kind == "bpe" else ["tokenizer.json", "tokenizer_config.json", "vocab.json"]
    if there := next((name for name in others if (output / name).exists()), None):
        raise UserError(f"--output {output} holds a tokenizer of another kind ({there}), which would be read in place "
                        "of this one; name a new folder")  # fmt: skip
    require_packages("orjson", *(["sentencepiece"] if kind == "sentencepiece" else []))
    texts = _Texts(find_files(inputs, hub), json_key, vocab_size)
    train = _train_bpe if kind == "bpe" else _train_sentencepiece
    with replacing_folder(output) as partial:
        learned = train(texts, vocab_size, partial)
    return TrainedTokenizer(output, learned, texts.documents, texts.characters)


class _Texts:
    """The texts of the files, once, with progress; counts what was read."""

    def __init__(self, files: Sequence[SourceFile], json_key: str, vocab_size: int) -> None:
        self.files, self.json_key, self.vocab_size = files, json_key, vocab_size
        self.documents = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        with Progress("reading", total_bytes(self.files)) as progress:
            for document in iter_documents(self.files, self.json_key):
                self.documents += 1
                self.characters += len(document.text)
                progress.advance(1, document.size)
                yield document.text
        if not self.documents:
            names = " ".join(file.path for file in self.files[:4])
            raise UserError(f"--input holds no text ({names}); name files with documents in them")
        print(f"learning {self.vocab_size:,} tokens ...", file=sys.stderr, flush=True)


def _train_bpe(texts: _Texts, vocab_size: int, folder: Path) -> int:
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
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PADDING
    )
    fast.save_pretrained(folder)
    tokenizer.model.save(str(folder))
    return len(fast)


def _train_sentencepiece(texts: _Texts, vocab_size: int, folder: Path) -> int:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    failed: list[BaseException] = []

    def lines() -> Iterator[str]:
        # SentencePiece turns an exception of its reader into a RuntimeError of another text.
        try:
            for text in texts:
                for line in filter(None, text.split("\n")):
                    step = _PIECE_BYTES // _UTF8_BYTES
                    yield from (line[start : start + step] for start in range(0, len(line), step))
        except BaseException as error:
            failed.append(error)

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=vocab_size, model_type="unigram",
            byte_fallback=True, hard_vocab_limit=False, num_threads=os.cpu_count() or 1, minloglevel=2,
            # Decoding gives the text back: no normalisation, all spaces, and a token for the line end.
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            user_defined_symbols=["\n"], max_sentence_length=_PIECE_BYTES, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        )  # fmt: skip
    except RuntimeError as error:
        if not failed:
            reason = " ".join(str(error).split())[-150:].rstrip(".")
            raise UserError(
                f"SentencePiece cannot learn {vocab_size} tokens ({reason}); change --vocab-size"
            ) from error
    if failed:
        raise failed[0]
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
