"""``megatron-recursive tokenizer``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example
from megatron_recursive.data.hub import add_hub_flags, hub_choice
from megatron_recursive.data.tokenizer_training import KINDS, MIN_VOCAB_SIZE, train_tokenizer

SUMMARY = "Train a tokenizer on documents: byte-level BPE, or SentencePiece."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a tokenizer. bpe is a folder for --tokenizer-model (Megatron, with --tokenizer-type "
        "HuggingFaceTokenizer) and transformers.AutoTokenizer; its vocab.json and merges.txt serve as --vocab-file and "
        "--merge-file. sentencepiece is DIR/tokenizer.model, for --tokenizer-type SentencePieceTokenizer."
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--input", required=True, nargs="+", metavar="PATH",
        help="documents, as for preprocess: files, folders, patterns, hf://NAME or another fsspec URL",
    )  # fmt: skip
    required.add_argument("--output", required=True, metavar="DIR", help="folder of the tokenizer; made if missing")
    required.add_argument(
        "--vocab-size", required=True, type=int, metavar="N",
        help=f"tokens, with the 256 bytes and <|endoftext|>; at least {MIN_VOCAB_SIZE}",
    )  # fmt: skip
    kind = parser.add_argument_group("kind and text")
    kind.add_argument("--type", choices=KINDS, default="bpe", help="kind of tokenizer")
    kind.add_argument("--json-key", default="text", metavar="KEY", help="key or column of the text")
    add_hub_flags(kind.add_argument)
    parser.epilog = example("tokenizer", "--input", "data/train.jsonl", "--output", "tokenizer", "--vocab-size", "4096")


def run(args: argparse.Namespace) -> None:
    trained = train_tokenizer(args.input, args.output, args.vocab_size, args.json_key, args.type, hub_choice(args))
    print(
        f"{trained.folder}: {trained.vocab_size:,} tokens, "
        f"from {trained.documents:,} documents, {trained.characters:,} characters"
    )
    if trained.vocab_size < args.vocab_size:
        print(f"the corpus has too few repeated pairs for {args.vocab_size:,} tokens; more text would give more")
