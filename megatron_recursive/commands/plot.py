"""``megatron-recursive plot``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example
from megatron_recursive.plots.loss_curve import plot_loss_curve

SUMMARY = "Draw the losses of a run from its metrics.jsonl."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw training and held-out losses, the held-out loss of each refinement block, and how far each block moves "
        "the output state. A run that is still writing can be drawn too."
    )
    required = parser.add_argument_group("required")
    required.add_argument("--metrics", required=True, metavar="FILE", help="metrics.jsonl of a run")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", metavar="PICTURE", help=".png, .pdf or .svg file (default: beside the metrics, with suffix .png)"
    )
    parser.epilog = example("plot", "--metrics", "runs/default/checkpoints/metrics.jsonl")


def run(args: argparse.Namespace) -> None:
    print(plot_loss_curve(args.metrics, args.output))
