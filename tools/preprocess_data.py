"""Tokenize .txt and .jsonl files into a Megatron dataset, PREFIX.bin and PREFIX.idx."""

from __future__ import annotations

import argparse
import os

from megatron_recursive.data.indexed import preprocess
from megatron_recursive.errors import report_user_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokenize documents into PREFIX.bin and PREFIX.idx, for Megatron's --data-path PREFIX. The files "
        "are complete or not there: an interrupted run leaves those of an earlier run, or none.",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help=".txt files (one document each), .jsonl files (one document a line), or folders of them",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files without .bin or .idx; folders are made"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    parser.add_argument("--json-key", default="text", help="key of the text in .jsonl lines (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes; the files do not depend on it (default here: %(default)s)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's eos_token (default: yes)",
    )
    return parser.parse_args()


@report_user_errors
def main() -> None:
    args = parse_args()
    written = preprocess(args.input, args.output, args.tokenizer, args.json_key, args.workers, args.append_eod)
    print(
        f"{written.documents:,} documents, {written.tokens:,} tokens, "
        f"{written.tokens / written.documents:.1f} tokens per document: {written.bin_file} and {written.idx_file}"
    )


if __name__ == "__main__":
    main()
