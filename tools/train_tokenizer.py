"""Train a tokenizer on documents: byte-level BPE, as a folder that transformers loads, or SentencePiece."""

from __future__ import annotations

import argparse

from megatron_recursive.data.tokenizer_training import KINDS, MIN_VOCAB_SIZE, train_tokenizer
from megatron_recursive.errors import report_user_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a tokenizer. bpe is a folder for --tokenizer-model (Megatron, with --tokenizer-type "
        "HuggingFaceTokenizer) and transformers.AutoTokenizer; its vocab.json and merges.txt serve as --vocab-file and "
        "--merge-file. sentencepiece is DIR/tokenizer.model, for --tokenizer-type SentencePieceTokenizer.",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help=".txt or .jsonl files (also .gz, .zst), .parquet files, folders of these, hf://NAME or another fsspec URL",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the tokenizer; made if missing")
    parser.add_argument(
        "--vocab-size",
        required=True,
        type=int,
        metavar="N",
        help=f"tokens, with the 256 bytes and <|endoftext|>; at least {MIN_VOCAB_SIZE}",
    )
    parser.add_argument("--type", choices=KINDS, default="bpe", help="kind of tokenizer (default: %(default)s)")
    parser.add_argument("--json-key", default="text", help="key or column of the text (default: %(default)s)")
    return parser.parse_args()


@report_user_errors
def main() -> None:
    args = parse_args()
    trained = train_tokenizer(args.input, args.output, args.vocab_size, args.json_key, args.type)
    print(
        f"{trained.folder}: {trained.vocab_size:,} tokens, "
        f"from {trained.documents:,} documents, {trained.characters:,} characters"
    )
    if trained.vocab_size < args.vocab_size:
        print(f"the corpus has too few repeated pairs for {args.vocab_size:,} tokens; more text would give more")


if __name__ == "__main__":
    main()
