"""``megatron-recursive summarize``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example
from megatron_recursive.commands.plot import add_runs, runs_of
from megatron_recursive.commands.shared import add_output, finish
from megatron_recursive.plots.run_summary import summarize_runs

SUMMARY = "Say in a few lines what a run trained and what came out, or set several side by side."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Of one run: what was trained, its losses, what each refinement block adds, and which health alarms spoke. Of "
        "several: a table, and whether the recursion earned its FLOPs against a run without it, or else the first run."
    )
    add_runs(parser)
    output = parser.add_argument_group("output")
    add_output(output)
    parser.epilog = example("summarize", "runs/default", "runs/plain")


def run(args: argparse.Namespace) -> None:
    text, figures = summarize_runs(runs_of(args))
    finish(args, figures, lambda _: [text])
