"""``megatron-recursive task``: hops, addition and evaluate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_recursive.command_line import command, example
from megatron_recursive.commands.generate import EXITS, prepare_transformers
from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    from megatron_recursive.data.tasks import Task

SUMMARY = "Make a task that needs depth, as training data, and count right answers on it by block."

_SHAPE = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 --swiglu --disable-bias-linear "
    "--normalization RMSNorm --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
    "--init-method-std 0.125 --num-refinement-blocks 2 --num-latent-refinements 1 --no-detach-between-refinements"
)
_RECIPE = (
    "--micro-batch-size 64 --global-batch-size 64 --train-iters 1500 --lr 2e-3 --min-lr 2e-5 --lr-decay-style cosine "
    "--lr-warmup-iters 50 --weight-decay 0.1 --adam-beta2 0.95 --log-interval 25 --eval-interval 250 --eval-iters 5 "
    "--save-interval 250 --tokenizer-type NullTokenizer --num-workers 0"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tasks on which a looped model is known to beat its own layers (Saunshi et al. 2025, arXiv 2502.17416)."
    )
    actions = parser.add_subparsers(
        dest="action", required=True, prog=parser.prog, title="actions, each with a --help of its own",
        metavar="{hops,addition,evaluate}",
    )  # fmt: skip
    hops = actions.add_parser("hops", help="k-hop induction")
    hops.description = (
        "k-hop induction: from a symbol to the successor of its last earlier occurrence, k times. Symbols and answers "
        "alternate, and each document tells its k."
    )
    _add_output(hops, "hops")
    task = hops.add_argument_group("task")
    task.add_argument("--hops", type=int, nargs="+", default=[4], metavar="K",
                      help="each document draws its k among these (default: 4)")  # fmt: skip
    task.add_argument("--alphabet", type=int, default=4, help="different symbols")
    task.add_argument("--length", type=int, default=48, help="symbols of a document, which has twice as many tokens")
    addition = actions.add_parser("addition", help="sums of several numbers")
    addition.description = "Addition of several numbers, the least significant digit first; the sum's digits are asked."
    _add_output(addition, "addition")
    task = addition.add_argument_group("task")
    task.add_argument("--summands", type=int, nargs="+", default=[2, 3, 4], metavar="K",
                      help="each document adds so many numbers, drawn among these (default: 2 3 4)")  # fmt: skip
    task.add_argument("--digits", type=int, default=3, help="of a number")
    _add_evaluate(actions.add_parser("evaluate", help="right answers by level and block, and where they leave"))
    parser.epilog = example("task", "hops", "--output", "runs/hops")


def _add_output(parser: argparse.ArgumentParser, name: str) -> None:
    required = parser.add_argument_group("required")
    required.add_argument("--output", required=True, metavar="DIR", help="folder for train and valid, .bin and .idx")
    size = parser.add_argument_group("size")
    size.add_argument("--train-documents", type=int, default=100_000, metavar="N", help="documents to train on")
    size.add_argument("--valid-documents", type=int, default=2_000, metavar="N", help="documents to evaluate on")
    size.add_argument("--seed", type=int, default=1234, help="the same one makes the same bytes")
    parser.epilog = example("task", name, "--output", f"runs/{name}")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Count right answers by level (hops, or summands) and block, each asked after the right ones before it; and "
        "under an exit, right answers and the blocks that they took."
    )
    # fmt: off
    required = parser.add_argument_group("required")
    required.add_argument("--model", required=True, metavar="DIR_OR_CKPT",
                          help="a Hugging Face folder or a Megatron checkpoint")
    required.add_argument("--data", required=True, metavar="PREFIX", help="of a task, without .bin: DIR/valid")
    depth = parser.add_argument_group("depth, of recursive models")
    depth.add_argument("--num-refinement-blocks", type=int, metavar="T", help="run T blocks (default: as trained)")
    depth.add_argument("--exit", choices=(*EXITS, "none"),
                       help="by what a token leaves (default: halting where the model has such a head)")
    depth.add_argument("--halt-threshold", type=float,
                       help="--exit halting: probability at which a token leaves (default: the model's)")
    depth.add_argument("--exit-threshold", type=float,
                       help="--exit output-change or kl: leave below this change (default: 0.03 or 0.001)")
    reading = parser.add_argument_group("reading and output")
    reading.add_argument("--documents", type=int, metavar="N", help="read the first N (default: all)")
    reading.add_argument("--batch-size", type=int, default=256, help="documents read at a time")
    reading.add_argument("--json", action="store_true", help="one JSON line, and nothing else on stdout")
    # fmt: on
    parser.epilog = example("task", "evaluate", "--model", "runs/hops/recursive", "--data", "runs/hops/valid")


def run(args: argparse.Namespace) -> None:
    if args.action == "evaluate":
        _evaluate(args)
    else:
        _write(args)


# --- writing --------------------------------------------------------------------------------------------------------


def _write(args: argparse.Namespace) -> None:
    from megatron_recursive.data.tasks import Addition, Hops, write_task

    task: Task
    if args.action == "hops":
        task = Hops(tuple(args.hops), args.alphabet, args.length)
    else:
        task = Addition(tuple(args.summands), args.digits)
    folder = Path(args.output)
    for number, split in enumerate(("train", "valid")):
        documents = getattr(args, f"{split}_documents")
        if documents < 2:
            raise UserError(f"--{split}-documents must be at least 2, but is {documents}.")
        new = write_task(task, folder / split, documents, (args.seed, number))
        there = "" if new else ", there already"
        print(f"{folder / split}: {documents:,} documents of {task.seq_length} tokens{there}")
    print("train a recursion on it:", f"  {training_line(task, folder)}", sep="\n")
    for name, what, flags in (("layers", "its layers, passed once", ""), ("deep", "as deep", "--num-layers 8 ")):
        ends = f"{flags}--disable-recursive-refinement --save {folder / name} --load {folder / name}"
        print(f"a plain GPT beside it, {what}: add {ends}")
    evaluate = command("task", "evaluate", "--model", str(folder / "recursive"), "--data", str(folder / "valid"))
    print("count right answers:", f"  {evaluate}", sep="\n")


def training_line(task: Task, folder: Path) -> str:
    """What trains a small recursion on a task that lies in a folder."""
    from megatron_recursive.data.tasks import ANSWERS, VOCAB_SIZE

    run, length = str(folder / "recursive"), str(task.seq_length)
    return command(
        "pretrain", *_SHAPE.split(), "--seq-length", length, "--max-position-embeddings", length, *_RECIPE.split(),
        "--vocab-size", str(VOCAB_SIZE), "--answer-tokens", str(ANSWERS), "--train-data-path", str(folder / "train"),
        "--valid-data-path", str(folder / "valid"), "--save", run, "--load", run,
    )  # fmt: skip


# --- evaluation -----------------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> None:
    prepare_transformers()
    from megatron_recursive.inference.answers import evaluate
    from megatron_recursive.inference.generation import Settings
    from megatron_recursive.inference.loading import open_model

    for flag in ("documents", "batch_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, but is {getattr(args, flag)}.")
    with open_model(args.model, num_refinement_blocks=args.num_refinement_blocks, text=False) as loaded:
        exit = args.exit
        if exit is None and loaded.recursive and loaded.model.config.has_halting:
            exit = "halting"
        settings = Settings(exit=None if exit == "none" else exit, halt_threshold=args.halt_threshold,
                            exit_threshold=args.exit_threshold)  # fmt: skip
        settings.check(loaded)
        result = evaluate(loaded, args.data, settings, batch_size=args.batch_size, documents=args.documents)
    if args.json:
        print(json.dumps({"model": args.model, "data": args.data, "exit": settings.exit, **result}))
        return
    print("\n".join(table(result["level"], result["rows"])))


def table(level: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a level: the share of right answers after each block, and under the exit."""
    blocks = [f"block {number + 1}" for number in range(len(rows[0]["accuracy"]))]
    exits = ["at exit", "mean exit block"] if "exit block" in rows[0] else []
    lines = ["  ".join([f"{level:<9}", f"{'answers':>9}", *(f"{name:>8}" for name in blocks + exits)])]
    for row in rows:
        cells = [f"{value:8.4f}" for value in row["accuracy"]]
        if exits:
            cells += [f"{row['exit accuracy']:8.4f}", f"{row['exit block']:15.2f}"]
        lines.append("  ".join([f"{row['level'] or 'all'!s:<9}", f"{row['answers']:9,}", *cells]))
    return lines
