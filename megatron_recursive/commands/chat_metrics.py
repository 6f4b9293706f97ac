"""``megatron-recursive chat-metrics``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.commands.count import aligned
from megatron_recursive.commands.generate import add_choice, add_depth, prepare_transformers
from megatron_recursive.commands.layers import add_output
from megatron_recursive.errors import UserError

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
    required.add_argument("--model", required=True, metavar="DIR_OR_CKPT", help="a Hugging Face folder, a .gguf file, "
                          "a name in the hub's cache, or a Megatron checkpoint")
    required.add_argument("--data", required=True, metavar="FILE_OR_PREFIX", help="held-out conversations: a file as "
                          "prepare-chat reads it, or the PREFIX that it has written")
    size = parser.add_argument_group("conversations")
    size.add_argument("--num-samples", type=int, default=256, help="conversations at most")
    size.add_argument("--batch-size", type=int, default=4, help="conversations, or answers, at a time")
    add_choice(parser)
    add_depth(parser)
    add_output(parser, "runs/chat_metrics.json", picture=False)
    parser.epilog = example("chat-metrics", "--model", "CKPT", "--data", "heldout.jsonl", "--max-tokens", "64")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(args, name)}.")
    prepare_transformers()
    from megatron_recursive.analysis.subject import open_subject
    from megatron_recursive.data.files import replacing
    from megatron_recursive.inference.chat_metrics import measure
    from megatron_recursive.inference.generation import Settings
    from megatron_recursive.inference.loading import set_blocks

    settings = Settings.of(args)
    record: dict[str, Any] = {"format": "megatron-recursive chat-metrics", "version": VERSION, "model": args.model,
                              "data": args.data}  # fmt: skip
    with open_subject(args.model, args.tokenizer, args.device) as loaded:
        if args.num_refinement_blocks is not None:
            set_blocks(loaded, args.num_refinement_blocks)
        settings.check(loaded)
        plan = getattr(loaded.model.config, "recursion_plan", None)
        record |= {"depth": None if plan is None or plan.is_plain else plan.depth, "exit": settings.exit}
        record |= measure(loaded, args.data, settings, args.num_samples, args.batch_size)
    output = Path(args.output)
    with replacing(output) as (partial,):
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record) if args.json else "\n".join([*table(record), "", f"{output}"]))


def table(record: dict[str, Any]) -> list[str]:
    left = f" ({record['left_out']} left out, longer than the model takes)" if record["left_out"] else ""
    depth = "" if record["depth"] is None else f" at depth {record['depth']}"
    depth += f", exit {record['exit']} after {record['mean_blocks']:.2f} blocks" if record["exit"] else ""
    rows = [["perplexity", f"{record['perplexity']:.3f}", f"of {record['tokens']:,} tokens of the assistant"],
            ["accuracy", f"{record['accuracy']:.4f}", "of the same, each the likeliest"]]  # fmt: skip
    if record["turns"]:
        rows += [["BLEU", f"{record['bleu']:.2f}", record["bleu_signature"]],
                 ["exact match", f"{record['exact_match']:.4f}", f"of {record['turns']:,} answers"],
                 ["ended", f"{record['ended']:.4f}", "of the same, by themselves"],
                 *([f"distinct-{n}", f"{record[f'distinct_{n}']:.4f}",
                    f"{record[f'references_distinct_{n}']:.4f} in the true answers"] for n in (1, 2))]  # fmt: skip
    return [f"{record['model']}{depth}: {record['conversations']} conversations of {record['data']}{left}", "",
            *aligned(["", "value", ""], rows)]  # fmt: skip
