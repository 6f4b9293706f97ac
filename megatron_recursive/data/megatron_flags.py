"""Flags of Megatron's ``tools/preprocess_data.py``, and what each becomes here. The guide holds the same table."""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from megatron_recursive.errors import UserError

_PIECES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer", *_PIECES)


class MegatronFlag(NamedTuple):
    """Flags with one answer. ``how``: taken with their meaning, needless (said, and the run goes on), or refused."""

    how: str
    names: tuple[str, ...]
    nargs: str | int | None
    answer: str


def _row(how: str, names: str, nargs: str | int | None, answer: str) -> MegatronFlag:
    return MegatronFlag(how, tuple(names.split()), nargs, answer)


MEGATRON_FLAGS = (
    _row("taken", "--input", "+", "the same; also several files, folders and URLs, and a pattern without --partitions"),
    _row("taken", "--output-prefix", None, "--output and, unless --json-keys is given, --json-keys text"),
    _row("taken", "--json-keys", "+", "the same: the files are PREFIX_KEY_document.bin and .idx, also of one key"),
    _row("taken", "--append-eod", 0, "the same, and the default; --no-append-eod leaves it out"),
    _row("taken", "--workers", None, "the same, with a default"),
    _row("taken", "--tokenizer-type", None, f"{', '.join(_TYPES)}, with the files of that type"),
    _row("taken", "--tokenizer-model", None, "--tokenizer"),
    _row("taken", "--vocab-file --merge-file", None, "the same"),
    _row("taken", "--tokenizer-hf-no-include-special-tokens", 0, "--no-special-tokens"),
    _row("needless", "--partitions", None, "parts are cut by size, and --workers processes read them"),
    _row("needless", "--keep-sequential-samples", 0, "documents always stay in the order of the input"),
    _row("needless", "--log-interval", None, "progress is shown every ten seconds"),
    _row("needless", "--lang", None, "it says in which language to --split-sentences"),
    _row("needless", "--keep-newlines", 0, "it says how to --split-sentences"),
    _row("needless", "--vocab-size --padded-vocab-size --vocab-extra-ids", None, "the ids are the tokenizer's"),
    _row("needless", "--no-pad-vocab-size --disable-pad-vocab-size", 0, "the ids are the tokenizer's"),
    _row("needless", "--tiktoken-pattern --tiktoken-num-special-tokens --null-tokenizer-eod-id --null-tokenizer-pad-id "
         "--chat-template", None, "no tokenizer that is taken here reads it"),
    _row("refused", "--split-sentences", 0, "sentences are for BERT and T5, whole documents for GPT; leave it out"),
    _row("refused", "--find-optimal-num-workers", 0, "give as many --workers as there are idle cores"),
    _row("refused", "--workers-to-check", "+", "give as many --workers as there are idle cores"),
    _row("refused", "--max-documents", None, "it is for --find-optimal-num-workers; cut the input instead"),
    _row("refused", "--trust-remote-code --tokenizer-hf-no-use-fast", 0,
         "tokenizers run as a tokenizer.json or a SentencePiece model, never as Python; convert it"),
    _row("refused", "--tokenizer-special-tokens", "+", "add the tokens to the tokenizer's own folder"),
    _row("refused", "--tokenizer-metadata", None, "name the tokenizer itself with --tokenizer"),
    _row("refused", "--tokenizer-sentencepiece-legacy --no-tokenizer-sentencepiece-ignore-extra-whitespaces "
         "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces", 0,
         "a SentencePiece model encodes as it says itself"),
)  # fmt: skip


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Add those that the parser lacks; its help leaves them to the guide."""
    for row in MEGATRON_FLAGS:
        for name in row.names:
            if name not in parser._option_string_actions:
                how = {"action": "store_true"} if row.nargs == 0 else {"nargs": row.nargs}
                parser.add_argument(name, help=argparse.SUPPRESS, **how)


def translate(args: argparse.Namespace) -> None:
    """Answer Megatron's flags among the arguments, and give the others their meaning.

    Raises:
        UserError: that of one cannot be had.
    """
    for row in MEGATRON_FLAGS:
        for name in row.names:
            if row.how == "taken" or not getattr(args, name.removeprefix("--").replace("-", "_"), None):
                continue
            if row.how == "refused":
                raise UserError(f"{name} is not taken: {row.answer}")
            print(f"{name} has no effect here: {row.answer}", file=sys.stderr)
    if args.tokenizer_hf_no_include_special_tokens:
        args.special_tokens = False
    kind, needs = args.tokenizer_type, None
    if kind not in (None, *_TYPES):
        needs = f"is none of {', '.join(_TYPES)}; convert the tokenizer to a tokenizer.json"
    elif kind in _PIECES and not str(args.tokenizer).endswith(".model"):
        needs = "needs --tokenizer-model FILE.model"
    elif kind == "GPT2BPETokenizer" and args.vocab_file is None:
        needs = "needs --vocab-file and --merge-file"
    elif kind == "HuggingFaceTokenizer" and args.tokenizer is None:
        needs = "needs --tokenizer-model FOLDER_OR_NAME"
    if needs:
        raise UserError(f"--tokenizer-type {kind} {needs}")
