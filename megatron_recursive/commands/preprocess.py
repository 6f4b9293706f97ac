"""``megatron-recursive preprocess``."""

from __future__ import annotations

import argparse
import json
import os

from megatron_recursive.command_line import example
from megatron_recursive.data.preprocess import EXECUTORS, ON_ERROR, parse_options, preprocess
from megatron_recursive.data.tokenizer import TokenizerChoice

SUMMARY = "Tokenize documents into a Megatron dataset, PREFIX.bin and PREFIX.idx."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize documents into PREFIX.bin and PREFIX.idx, for Megatron's --data-path PREFIX. The files are complete "
        "or not there, with PREFIX.idx.json, which says how they were made. Complete parts of an interrupted run stay "
        "in PREFIX.partial, and the same command goes on from them; once done, it does nothing. The last line is JSON."
    )
    # fmt: off
    add = parser.add_argument_group("required: input, output, and a tokenizer in one of two ways").add_argument
    add("--input", required=True, nargs="+", metavar="PATH",
        help=".txt files (one document each), .jsonl files (one a line), both also .gz or .zst, .parquet files (one a "
        "row), folders of these, hf://NAME (a data set of the Hugging Face hub) or another fsspec URL")
    add("--output", required=True, metavar="PREFIX",
        help="path of the files without .bin or .idx; folders are made")
    add("--tokenizer", metavar="DIR_OR_MODEL",
        help="Hugging Face folder or name, folder of vocab.json and merges.txt, or SentencePiece .model")
    add("--vocab-file", metavar="FILE", help="GPT-2's vocab.json, instead of --tokenizer")
    add("--merge-file", metavar="FILE", help="GPT-2's merges.txt, with --vocab-file")
    add = parser.add_argument_group("documents and files").add_argument
    add("--overwrite", action="store_true", help="replace files of PREFIX that were made otherwise")
    add("--json-key", default="text", metavar="KEY", help="key or column of the text")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the tokenizer's end-of-document token")
    add("--no-special-tokens", dest="special_tokens", action="store_false",
        help="leave out what the tokenizer puts around a text, such as Llama's begin token (default: as in inference)")
    add("--on-error", choices=ON_ERROR, default="stop",
        help="at a malformed document: stop and name its line, or skip and count it")
    add = parser.add_argument_group("where the work is done").add_argument
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes; the files do not depend on it (default here: %(default)s)")
    add("--executor", choices=EXECUTORS, default="local", help="this machine, a SLURM cluster or a Ray cluster")
    add("--executor-options", nargs="+", default=[], metavar="NAME=VALUE",
        help="arguments of datatrove's executor; slurm needs partition and time")
    # fmt: on
    parser.epilog = example(
        "preprocess", "--input", "data/train.jsonl", "--output", "data/train", "--tokenizer", "tokenizer"
    )


def run(args: argparse.Namespace) -> None:
    tokenizer = TokenizerChoice(args.tokenizer, args.vocab_file, args.merge_file, args.special_tokens).check()
    written = preprocess(
        args.input, args.output, tokenizer, args.json_key, args.workers, args.append_eod, args.on_error,
        args.executor, parse_options(args.executor_options), overwrite=args.overwrite,
    )  # fmt: skip
    if written is None:
        print(f"submitted; {args.output}.bin and .idx appear when the last job, which joins the parts, has ended")
        return
    if written.skipped:
        print(f"{written.skipped:,} malformed documents were skipped; the first:", *written.reasons, sep="\n  ")
    print(
        f"{written.documents:,} documents, {written.tokens:,} tokens, "
        f"{written.tokens / written.documents:.1f} tokens per document: {written.bin_file} and {written.idx_file}"
    )
    print(json.dumps({"documents": written.documents, "tokens": written.tokens, "skipped": written.skipped}))
