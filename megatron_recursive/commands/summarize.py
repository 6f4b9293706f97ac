"""``megatron-recursive summarize``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example
from megatron_recursive.plots.run_summary import summarize_run

SUMMARY = "Say in a few lines what a run trained and what came out, from its metrics.jsonl."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what was trained, the losses at the start and at the end, the held-out loss after each refinement block, "
        "and which health alarms spoke."
    )
    required = parser.add_argument_group("required")
    required.add_argument("--metrics", required=True, metavar="FILE", help="metrics.jsonl of a run")
    parser.epilog = example("summarize", "--metrics", "runs/default/checkpoints/metrics.jsonl")


def run(args: argparse.Namespace) -> None:
    print(summarize_run(args.metrics))
