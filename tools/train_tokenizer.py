"""Train a byte-level BPE tokenizer on .txt and .jsonl files, as a folder that transformers loads."""

from __future__ import annotations

import argparse

from megatron_recursive.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from megatron_recursive.errors import report_user_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer and write it as a folder for --tokenizer-model (Megatron, with "
        "--tokenizer-type HuggingFaceTokenizer) and transformers.AutoTokenizer.",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help=".txt files (one document each), .jsonl files (one document a line), or folders of them",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the tokenizer; made if missing")
    parser.add_argument(
        "--vocab-size",
        required=True,
        type=int,
        metavar="N",
        help=f"tokens, with the 256 bytes and <|endoftext|>; at least {MIN_VOCAB_SIZE}",
    )
    parser.add_argument("--json-key", default="text", help="key of the text in .jsonl lines (default: %(default)s)")
    return parser.parse_args()


@report_user_errors
def main() -> None:
    args = parse_args()
    trained = train_tokenizer(args.input, args.output, args.vocab_size, args.json_key)
    print(
        f"{trained.folder}: {trained.vocab_size:,} tokens, "
        f"from {trained.documents:,} documents, {trained.characters:,} characters"
    )
    if trained.vocab_size < args.vocab_size:
        print(f"the corpus has too few repeated pairs for {args.vocab_size:,} tokens; more text would give more")


if __name__ == "__main__":
    main()
