"""``megatron-recursive mix``."""

from __future__ import annotations

import argparse
import json

from megatron_recursive.command_line import example
from megatron_recursive.commands.preprocess import add_workers
from megatron_recursive.data.hub import add_hub_flags, hub_choice
from megatron_recursive.data.preprocess import ON_ERROR, parse_options

SUMMARY = "Mix corpora by weight into shuffled Parquet shards."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Mix corpora, or take one, into DIR/00000.parquet and so on: shards of even size, all documents in one random "
        "order. No document is taken twice; the corpus that runs out first limits a mixture by weight (name its files "
        "twice to repeat it). DIR is complete or not there, with DIR/_mixture.json, which says how it was made. What "
        "is complete of an interrupted run stays in DIR.partial, which takes as much disk as the text, and the same "
        "command goes on from it. The last line is JSON."
    )
    # fmt: off
    add = parser.add_argument_group("required").add_argument
    add("--input", required=True, nargs="+", action="append", metavar="PATH",
        help="a corpus: what preprocess reads (files, folders, patterns, hf://NAME, URLs); once for each corpus")
    add("--output", required=True, metavar="DIR", help="folder of the shards, which must not exist")
    add("--num-shards", required=True, type=int, metavar="N", help="files, of even text size")
    add = parser.add_argument_group("the mixture").add_argument
    add("--weights", nargs="+", type=float, metavar="W",
        help="for each --input its share of the text in bytes, as any numbers (default: everything, once)")
    add("--seed", type=int, default=0, metavar="N", help="of the order, and of which documents are taken")
    add("--json-key", default="text", metavar="KEY", help="key or column of the text")
    add_hub_flags(add)
    add("--on-error", choices=ON_ERROR, default="stop",
        help="at a malformed document: stop and name its line, or skip and count it")
    add("--memory-mb", type=int, default=1024, metavar="N",
        help="what each process may take, with its libraries (row groups of a .parquet input come on top)")
    # fmt: on
    add_workers(parser)
    parser.epilog = example("mix", "--input", "data/web", "--input", "data/books", "--weights", "3", "1",
                            "--num-shards", "64", "--output", "data/mixture")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from megatron_recursive.data.mixing import Mixture, mix
    from megatron_recursive.data.statistics import Statistics

    mixture = Mixture(args.num_shards, args.weights, args.seed, args.json_key, args.on_error)
    made = mix(args.input, args.output, mixture, hub_choice(args), args.workers, args.executor,
               parse_options(args.executor_options), args.memory_mb)  # fmt: skip
    if made is None:
        print(f"submitted; {args.output} appears when the last job has ended")
        return
    print(Statistics(**{"tokens": None, **made["statistics"]}).table())
    for each in made["corpora"]:
        print(f"{each['share']:.4%} of the text, {each['documents']:,} documents, from {each['first_file']}")
    print(f"{args.output}: {args.num_shards:,} shards; a process took {made['peak_memory_mb']:,} MB at most")
    print(json.dumps(made))
