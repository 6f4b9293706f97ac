"""Write a small English corpus, taken from the Python that runs this script, as train.jsonl and valid.jsonl."""

from __future__ import annotations

import argparse

from megatron_recursive.data.cpython_corpus import write_cpython_corpus
from megatron_recursive.errors import report_user_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a small English corpus without network: Python's language reference and the docstrings of "
        "its standard library, one document per topic and module, about 5%% of them held out.",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for train.jsonl and valid.jsonl; made if missing"
    )
    return parser.parse_args()


@report_user_errors
def main() -> None:
    summary = write_cpython_corpus(parse_args().output)
    print(f"documents of Python {summary.python_version}:")
    print(f"  {summary.train_file}: {summary.train_documents:,} documents, {summary.train_characters:,} characters")
    print(f"  {summary.valid_file}: {summary.valid_documents:,} documents, {summary.valid_characters:,} characters")


if __name__ == "__main__":
    main()
