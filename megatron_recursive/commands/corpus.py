"""``megatron-recursive corpus``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example

SUMMARY = "Write a small English corpus, taken from the Python that runs this, as train.jsonl and valid.jsonl."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a small English corpus without network: Python's language reference and the docstrings of its standard "
        "library, one document per topic and module, about 5% of them held out."
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--output", required=True, metavar="DIR", help="folder for train.jsonl and valid.jsonl; made if missing"
    )
    parser.epilog = example("corpus", "--output", "data")


def run(args: argparse.Namespace) -> None:
    from megatron_recursive.data.cpython_corpus import write_cpython_corpus

    summary = write_cpython_corpus(args.output)
    print(f"documents of Python {summary.python_version}:")
    print(f"  {summary.train_file}: {summary.train_documents:,} documents, {summary.train_characters:,} characters")
    print(f"  {summary.valid_file}: {summary.valid_documents:,} documents, {summary.valid_characters:,} characters")
