"""``megatron-recursive task``: hops, addition and evaluate."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import command, example
from megatron_recursive.commands import shared
from megatron_recursive.errors import UserError

SUMMARY = "Make a task that needs depth, as training data, and count right answers on it by block."

_RECURSION = "--num-refinement-blocks 2 --num-latent-refinements 1"
_RECIPE = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 --swiglu --disable-bias-linear "
    "--normalization RMSNorm --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
    "--init-method-std 0.125 --micro-batch-size 64 --global-batch-size 64 --train-iters 2000 --lr 4e-3 --min-lr 4e-4 "
    "--lr-decay-style cosine --lr-warmup-iters 50 --weight-decay 0.1 --adam-beta2 0.95 --log-interval 25 "
    "--eval-interval 250 --eval-iters 5 --save-interval 250 --tokenizer-type NullTokenizer --num-workers 0"
)
_PLAIN = (("layers", "its layers passed once", ()), ("deep", "a plain GPT of its depth", ("--num-layers", "8")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tasks on which a looped model is known to beat its own layers (Saunshi et al. 2025, arXiv 2502.17416)."
    )
    actions = parser.add_subparsers(
        dest="action", required=True, prog=parser.prog, title="actions, each with a --help of its own",
        metavar="{hops,addition,evaluate}",
    )  # fmt: skip
    # fmt: off
    task = _add_making(actions, "hops", "k-hop induction: from a symbol to the successor of its last earlier "
                       "occurrence, k times. Symbols and answers alternate, and each document tells its k.")
    task.add_argument("--hops", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], metavar="K",
                      help="each document draws its k among these (default: 1 to 6)")
    task.add_argument("--alphabet", type=int, default=4, help="different symbols")
    task.add_argument("--length", type=int, default=48, help="symbols of a document, which has twice as many tokens")
    task = _add_making(actions, "addition", "Sums of several numbers, the least significant digit first; the digits of "
                       "the sum are asked, and each document tells how many numbers it adds.")
    task.add_argument("--summands", type=int, nargs="+", default=[2, 3, 4], metavar="K",
                      help="each document adds so many numbers, drawn among these (default: 2 3 4)")
    task.add_argument("--digits", type=int, default=3, help="of a number")

    parser.epilog = example("task", "hops", "--output", "runs/hops")
    evaluate = actions.add_parser("evaluate", help="count right answers by level and block, and where they leave")
    evaluate.description = (
        "Count right answers by level (hops, or summands) and block, as training asks for them; and under an exit, "
        "right answers and the blocks that they took."
    )
    required = evaluate.add_argument_group("required")
    shared.add_model(required, "a Hugging Face folder or a Megatron checkpoint")
    required.add_argument("--data", required=True, metavar="PREFIX", help="of a task, without .bin: DIR/valid")
    depth = evaluate.add_argument_group("depth, of recursive models; device and output")
    shared.add_depth(depth, (*shared.EXITS, "none"), "halting where the model has such a head")
    shared.add_device(depth)
    shared.add_output(depth)
    evaluate.epilog = example("task", "evaluate", "--model", "runs/hops/recursive", "--data", "runs/hops/valid")
    # fmt: on


def _add_making(actions: Any, name: str, description: str) -> Any:
    parser = actions.add_parser(name, help=description.partition(":")[0].partition(",")[0], description=description)
    required = parser.add_argument_group("required")
    required.add_argument("--output", required=True, metavar="DIR", help="folder for train and valid, .bin and .idx")
    size = parser.add_argument_group("size")
    size.add_argument("--train-documents", type=int, default=100_000, metavar="N", help="documents to train on")
    size.add_argument("--valid-documents", type=int, default=2_000, metavar="N", help="documents to evaluate on")
    size.add_argument("--seed", type=int, default=1234, help="the same one makes the same bytes")
    parser.epilog = example("task", name, "--output", f"runs/{name}")
    return parser.add_argument_group("task")


def run(args: argparse.Namespace) -> None:
    (_evaluate if args.action == "evaluate" else _make)(args)


def _make(args: argparse.Namespace) -> None:
    """Write the data, and say how to train on it: a recursion, and what it is to be compared with."""
    from megatron_recursive.data.tasks import ANSWERS, VOCAB_SIZE, Addition, Hops, may_share, share_in, write_task

    task = (Hops(tuple(args.hops), args.alphabet, args.length) if args.action == "hops"
            else Addition(tuple(args.summands), args.digits))  # fmt: skip
    folder, length, ends = Path(args.output), str(task.seq_length), {}
    apart = folder / "train" if may_share(task, args.train_documents, args.valid_documents) else None
    for number, split in enumerate(("train", "valid")):
        documents = getattr(args, f"{split}_documents")
        if documents < 2:
            raise UserError(f"--{split}-documents must be at least 2, but is {documents}.")
        others = apart if number else None
        there = "" if write_task(task, folder / split, documents, (args.seed, number), others) else ", there already"
        print(f"{folder / split}: {documents:,} documents of {task.seq_length} tokens{there}")
    if apart is not None and (share := share_in(folder / "valid", apart)):
        more = "a longer --length" if args.action == "hops" else "more --digits"
        print(f"{share:.1%} of the documents to evaluate on are among those to train on, since there are too few "
              f"others; give {more}, or fewer --train-documents.")  # fmt: skip
    for name in ("recursive", "layers", "deep"):
        ends[name] = ("--save", str(folder / name), "--load", str(folder / name))
    print("train a recursion on it:")
    print(" ", command(
        "pretrain", *_RECIPE.split(), *_RECURSION.split(), "--seq-length", length, "--max-position-embeddings", length,
        "--vocab-size", str(VOCAB_SIZE), "--answer-tokens", str(ANSWERS), "--train-data-path", str(folder / "train"),
        "--valid-data-path", str(folder / "valid"), *ends["recursive"],
    ))  # fmt: skip
    for name, what, flags in _PLAIN:
        print(f"{what}: the same, and", shlex.join(["--disable-recursive-refinement", *flags, *ends[name]]))
    print("count right answers:")
    print(" ", command("task", "evaluate", "--model", str(folder / "recursive"), "--data", str(folder / "valid")))


def _evaluate(args: argparse.Namespace) -> None:
    shared.prepare_transformers()
    from megatron_recursive.inference.answers import evaluate
    from megatron_recursive.inference.generation import Settings
    from megatron_recursive.inference.loading import open_model

    with open_model(
        args.model, num_refinement_blocks=args.num_refinement_blocks, numbers=True, device=args.device
    ) as loaded:
        exit = args.exit
        if exit is None and loaded.recursive and loaded.model.config.has_halting:
            exit = "halting"
        settings = Settings(exit=None if exit == "none" else exit, halt_threshold=args.halt_threshold,
                            exit_threshold=args.exit_threshold)  # fmt: skip
        settings.check(loaded)
        level, rows = evaluate(loaded, args.data, settings)
    record = {"model": args.model, "data": args.data, "exit": settings.exit, "rows": rows}
    shared.finish(args, record, lambda _: table(level, rows))


def table(level: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a level: the share of right answers after each block, of documents all right, and under the exit."""
    names = [level, "answers", *(f"block {number + 1}" for number in range(len(rows[0]["accuracy"]))), "whole"]
    if "exit block" in rows[0]:
        names += ["at exit", "mean exit block"]
    lines = ["".join(f"{name:<10}" for name in names).rstrip()]
    for row in rows:
        shares = [*row["accuracy"], *([row["exit accuracy"]] if "exit block" in row else [])]
        cells = [str(row["level"] or "all"), f"{row['answers']:,}", *(f"{share:.4f}" for share in shares)]
        cells.insert(2 + len(row["accuracy"]), f"{row['whole']:.4f}")
        cells += [f"{row['exit block']:.2f}"] if "exit block" in row else []
        lines.append("".join(f"{cell:<10}" for cell in cells).rstrip())
    return lines
