"""``megatron-recursive plot``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example
from megatron_recursive.errors import UserError
from megatron_recursive.plots.loss_curve import AXES, plot_loss_curve

SUMMARY = "Draw the losses of one or several runs into a picture."


def add_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runs, of which one is required")
    group.add_argument("runs", nargs="*", metavar="RUN",
                       help="a --save folder, the folder around it, or a metrics.jsonl")  # fmt: skip
    group.add_argument("--metrics", nargs="+", action="extend", default=[], metavar="RUN", help="the same as a flag")


def runs_of(args: argparse.Namespace) -> list[str]:
    if not args.runs + args.metrics:
        raise UserError("RUN is missing; name a run's --save folder or its metrics.jsonl, or several.")
    return [*args.runs, *args.metrics]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw language-model and halting loss, the held-out loss after each refinement block, and how far each block "
        "moves the output state: a colour a run, all on one scale. A run that is still writing can be drawn too."
    )
    add_runs(parser)
    picture = parser.add_argument_group("picture")
    picture.add_argument("--output", metavar="PICTURE", help=".png, .pdf or .svg file (default: beside the metrics, "
                         "with suffix .png; of several runs comparison.png)")  # fmt: skip
    picture.add_argument("--x", choices=tuple(AXES), help="what lies along the x axis (default: tokens of several runs "
                         "that all tell them, or else iteration)")  # fmt: skip
    parser.epilog = example("plot", "runs/default", "runs/plain", "--x", "flops")


def run(args: argparse.Namespace) -> None:
    print(plot_loss_curve(runs_of(args), args.output, args.x))
