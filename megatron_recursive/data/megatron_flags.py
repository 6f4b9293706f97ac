"""Flags of Megatron's ``tools/preprocess_data.py``, and what each becomes here. The guide holds the same table."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from megatron_recursive.errors import UserError

_PIECES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer", *_PIECES)


# (how, names, argparse's nargs, answer): taken with its meaning, needless (said, and the run goes on), or refused.
MEGATRON_FLAGS: tuple[tuple[str, str, str | int | None, str], ...] = (
    ("taken", "--input", "+", "the same; also several files, folders and URLs, and a pattern without --partitions"),
    ("taken", "--output-prefix", None, "--output and, unless --json-keys is given, --json-keys text"),
    ("taken", "--json-keys", "+", "the same: the files are PREFIX_KEY_document.bin and .idx, also of one key"),
    ("taken", "--append-eod", 0, "the same, and the default; --no-append-eod leaves it out"),
    ("taken", "--workers", None, "the same, with a default"),
    ("taken", "--tokenizer-type", None, f"{', '.join(TOKENIZER_TYPES)}, with the files of that type"),
    ("taken", "--tokenizer-model", None, "--tokenizer"),
    ("taken", "--vocab-file --merge-file", None, "the same"),
    ("taken", "--tokenizer-hf-no-include-special-tokens", 0, "--no-special-tokens"),
    ("needless", "--partitions", None, "parts are cut by size, and --workers processes read them"),
    ("needless", "--keep-sequential-samples", 0, "documents always stay in the order of the input"),
    ("needless", "--log-interval", None, "progress is shown every ten seconds"),
    ("needless", "--lang", None, "it says in which language to --split-sentences"),
    ("needless", "--keep-newlines", 0, "it says how to --split-sentences"),
    ("needless", "--vocab-size --padded-vocab-size --vocab-extra-ids", None, "the ids are the tokenizer's"),
    ("needless", "--no-pad-vocab-size --disable-pad-vocab-size", 0, "the ids are the tokenizer's"),
    ("needless", "--tiktoken-pattern --tiktoken-num-special-tokens --null-tokenizer-eod-id --null-tokenizer-pad-id "
     "--chat-template", None, "no tokenizer that is taken here reads it"),
    ("refused", "--split-sentences", 0, "sentences are for BERT and T5, whole documents for GPT; leave it out"),
    ("refused", "--find-optimal-num-workers", 0, "give as many --workers as there are idle cores"),
    ("refused", "--workers-to-check", "+", "give as many --workers as there are idle cores"),
    ("refused", "--max-documents", None, "it is for --find-optimal-num-workers; cut the input instead"),
    ("refused", "--trust-remote-code --tokenizer-hf-no-use-fast", 0,
     "tokenizers run as a tokenizer.json or a SentencePiece model, never as Python; convert it"),
    ("refused", "--tokenizer-special-tokens", "+", "add the tokens to the tokenizer's own folder"),
    ("refused", "--tokenizer-metadata", None, "name the tokenizer itself with --tokenizer"),
    ("refused", "--tokenizer-sentencepiece-legacy --no-tokenizer-sentencepiece-ignore-extra-whitespaces "
     "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces", 0,
     "a SentencePiece model encodes as it says itself"),
)  # fmt: skip


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Add those that the parser lacks; its help leaves them to the guide."""
    parser.add_argument("--output-prefix", action=_OutputPrefix, dest="output", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer-model", dest="tokenizer", help=argparse.SUPPRESS)
    for _, names, nargs, _ in MEGATRON_FLAGS:
        for name in names.split():
            if name not in parser._option_string_actions:
                how = {"action": "store_true"} if nargs == 0 else {"nargs": nargs}
                parser.add_argument(name, help=argparse.SUPPRESS, **how)


class _OutputPrefix(argparse.Action):
    """Stands for ``--output``, and brings Megatron's names of files."""

    def __call__(self, parser: Any, args: argparse.Namespace, values: Any, option: str | None = None) -> None:
        args.output, args.json_keys = values, args.json_keys or ["text"]
        for action in parser._actions:
            action.required &= action.dest != self.dest


def translate(args: argparse.Namespace) -> None:
    """Answer Megatron's flags among the arguments, and give the others their meaning.

    Raises:
        UserError: that of one cannot be had.
    """
    for how, names, _, answer in MEGATRON_FLAGS:
        for name in names.split():
            if how == "taken" or not getattr(args, name.removeprefix("--").replace("-", "_"), None):
                continue
            if how == "refused":
                raise UserError(f"{name} is not taken: {answer}")
            print(f"{name} has no effect here: {answer}", file=sys.stderr)
    if args.tokenizer_hf_no_include_special_tokens:
        args.special_tokens = False
    kind, needs = args.tokenizer_type, None
    if kind not in (None, *TOKENIZER_TYPES):
        needs = f"is none of {', '.join(TOKENIZER_TYPES)}; convert the tokenizer to a tokenizer.json"
    elif kind in _PIECES and not str(args.tokenizer).endswith(".model"):
        needs = "needs --tokenizer-model FILE.model"
    elif kind == "GPT2BPETokenizer" and args.vocab_file is None:
        needs = "needs --vocab-file and --merge-file"
    elif kind == "HuggingFaceTokenizer" and args.tokenizer is None:
        needs = "needs --tokenizer-model FOLDER_OR_NAME"
    if needs:
        raise UserError(f"--tokenizer-type {kind} {needs}")
