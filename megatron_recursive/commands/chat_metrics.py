"""``megatron-recursive chat-metrics``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.commands import shared
from megatron_recursive.commands.generate import add_settings
from megatron_recursive.errors import UserError
from megatron_recursive.figures import aligned

SUMMARY = "Measure a chat model on held-out turns: perplexity, BLEU, exact matches, and distinct words."
VERSION = 1  # of the record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "Perplexity and accuracy at the assistant's tokens; and the model's own answers, each after the true turns "
        "before it, against the true ones: BLEU, exact matches, and distinct-1 and -2 beside those of the true ones. "
        "Answers are greedy unless a choice of tokens is given. Writes JSON with every answer."
    )
    required = parser.add_argument_group("required")
    shared.add_model(required)
    required.add_argument("--data", required=True, metavar="FILE_OR_PREFIX", help="held-out conversations: a file as "
                          "prepare-chat reads it, or the PREFIX that it has written (of one that a checkpoint was "
                          "trained on, what --split held out)")
    size = parser.add_argument_group("conversations")
    size.add_argument("--num-samples", type=int, default=256, help="conversations at most")
    size.add_argument("--batch-size", type=int, default=4, help="conversations, or answers, at a time")
    add_settings(parser)
    shared.add_measuring(parser, "runs/chat_metrics.json", picture=False)
    parser.epilog = example("chat-metrics", "--model", "CKPT", "--data", "heldout.jsonl", "--max-tokens", "64")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    if min(args.num_samples, args.batch_size) < 1:
        raise UserError("--num-samples and --batch-size must be at least 1.")
    shared.prepare_transformers()
    from megatron_recursive.analysis.subject import open_subject
    from megatron_recursive.inference.chat_metrics import measure
    from megatron_recursive.inference.generation import Settings
    from megatron_recursive.inference.loading import set_blocks

    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    record: dict[str, Any] = {"format": "megatron-recursive chat-metrics", "version": VERSION, "model": args.model,
                              "data": args.data}  # fmt: skip
    with open_subject(args.model, args.tokenizer, args.device) as loaded:
        if args.num_refinement_blocks is not None:
            set_blocks(loaded, args.num_refinement_blocks)
        settings.check(loaded)
        plan = getattr(loaded.model.config, "recursion_plan", None)
        record |= {"depth": None if plan is None or plan.is_plain else plan.depth, "exit": settings.exit}
        record |= measure(loaded, args.data, settings, args.num_samples, args.batch_size)
    shared.finish(args, record, table)


def table(record: dict[str, Any]) -> list[str]:
    """Every number, with the name that it has in the JSON."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "version"}
    return aligned(["", record["model"]], [[name.replace("_", " "), f"{value:,}" if isinstance(value, int) else
                                            f"{value:.4f}"] for name, value in numbers.items()])  # fmt: skip
