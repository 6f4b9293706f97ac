"""``megatron-recursive preprocess``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.data.hub import add_hub_flags, hub_choice
from megatron_recursive.data.megatron_flags import add_megatron_flags, translate
from megatron_recursive.data.preprocess import EXECUTORS, ON_ERROR, Options, parse_options, preprocess, preprocess_keys
from megatron_recursive.data.tokenizer import TokenizerChoice
from megatron_recursive.errors import UserError

SUMMARY = "Tokenize documents into a Megatron dataset, PREFIX.bin and PREFIX.idx."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize documents into PREFIX.bin and PREFIX.idx, for Megatron's --data-path PREFIX. The files are complete "
        "or not there, with PREFIX.idx.json, which says how they were made. Complete parts of an interrupted run stay "
        "in PREFIX.partial, and the same command goes on from them; once done, it does nothing. Flags of Megatron's "
        "preprocess_data.py work too (section 14 of the guide). The last line is JSON."
    )
    # fmt: off
    add = parser.add_argument_group("required: input, output, and a tokenizer in one of two ways").add_argument
    add_input_and_output(add, ".txt files (one document each; of more than 4 MiB one every 4 MiB, cut at line ends), "
                              ".jsonl or .json files (one a line)")
    add("--tokenizer", metavar="DIR_OR_MODEL",
        help="Hugging Face folder or name, folder of vocab.json and merges.txt, or SentencePiece .model")
    add("--vocab-file", metavar="FILE", help="GPT-2's vocab.json, instead of --tokenizer")
    add("--merge-file", metavar="FILE", help="GPT-2's merges.txt, with --vocab-file")
    add = parser.add_argument_group("documents and files").add_argument
    add("--overwrite", action="store_true", help="replace files of PREFIX that were made otherwise")
    add("--json-key", metavar="KEY", help="key or column of the text (default: text)")
    add("--json-keys", nargs="+", metavar="KEY", help="several, each into PREFIX_KEY_document as by Megatron")
    add_hub_flags(add)
    add("--no-join", dest="join", action="store_false",
        help="leave each part a dataset, and write PREFIX.data_args, which pretrain reads with --data-args-path")
    add("--pipeline", metavar="MODULE:FUNCTION",
        help="function that returns steps of datatrove's, between reading and tokenizing: filters, deduplication")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the tokenizer's end-of-document token")
    add("--no-special-tokens", dest="special_tokens", action="store_false",
        help="leave out what the tokenizer puts around a text, such as Llama's begin token (default: as in inference)")
    add("--on-error", choices=ON_ERROR, default="stop",
        help="at a malformed document: stop and name its line, or skip and count it; unreadable files always stop")
    # fmt: on
    add_workers(parser)
    add_megatron_flags(parser)
    parser.epilog = example(
        "preprocess", "--input", "data/train.jsonl", "--output", "data/train", "--tokenizer", "tokenizer"
    )


def add_input_and_output(add: Callable[..., Any], files: str) -> None:
    """What a command that prepares data reads and writes; ``files`` are those that it reads beside .parquet."""
    add("--input", required=True, nargs="+", metavar="PATH",
        help=f"{files}, all also .gz, .bz2 or .zst, .parquet files (one a row), folders and patterns of these, "
        "hf://NAME[@REVISION][/GLOB] (a data set of the Hugging Face hub) or another fsspec URL")  # fmt: skip
    add("--output", required=True, metavar="PREFIX",
        help="path of the files without .bin or .idx; folders are made")  # fmt: skip


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Where and by how many processes data are prepared."""
    # fmt: off
    add = parser.add_argument_group("where the work is done").add_argument
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes; the files do not depend on it (default here: %(default)s)")
    add("--executor", choices=EXECUTORS, default="local", help="this machine, a SLURM cluster or a Ray cluster")
    add("--executor-options", nargs="+", default=[], metavar="NAME=VALUE",
        help="arguments of datatrove's executor; slurm needs partition and time")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    translate(args)
    if args.json_keys and args.json_key:
        raise UserError("give --json-key and --output for one dataset PREFIX, or --json-keys for PREFIX_KEY_document")
    settings = {
        "tokenizer": TokenizerChoice(args.tokenizer, args.vocab_file, args.merge_file, args.special_tokens).check(),
        "workers": args.workers, "executor": args.executor, "executor_options": parse_options(args.executor_options),
        "overwrite": args.overwrite, "hub": hub_choice(args),
        "options": Options(args.append_eod, args.on_error, args.join, args.pipeline),
    }  # fmt: skip
    if args.json_keys:
        all_written = preprocess_keys(args.json_keys, args.input, args.output, **settings)
    else:
        all_written = [preprocess(args.input, args.output, json_key=args.json_key or "text", **settings)]
    for written in all_written:
        if written is None:
            print(f"submitted; the files of {args.output} appear when the last job, which joins the parts, has ended")
            continue
        if written.statistics is not None:
            print(written.statistics.table())
        print(
            f"{written.documents:,} documents, {written.tokens:,} tokens, "
            f"{written.tokens / written.documents:.1f} tokens per document: {' and '.join(map(str, written.files))}"
        )
    done = [written for written in all_written if written is not None]
    counts = ("documents", "tokens", "skipped")
    if done:
        statistics = done[0].statistics.to_dict() if len(done) == 1 and done[0].statistics else {}
        print(json.dumps({**statistics, **{name: sum(getattr(each, name) for each in done) for name in counts}}))
