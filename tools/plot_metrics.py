"""Draw the losses of a run from its metrics.jsonl."""

from __future__ import annotations

import argparse

from megatron_recursive.errors import report_user_errors
from megatron_recursive.plots.loss_curve import plot_loss_curve


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw training and held-out losses, the held-out loss of each refinement block, and how far each "
        "block moves the output state. A run that is still writing can be drawn too.",
    )
    parser.add_argument("--metrics", required=True, metavar="FILE", help="metrics.jsonl of a run")
    parser.add_argument(
        "--output", metavar="PICTURE", help=".png, .pdf or .svg file (default: beside the metrics, with suffix .png)"
    )
    return parser.parse_args()


@report_user_errors
def main() -> None:
    args = parse_args()
    print(plot_loss_curve(args.metrics, args.output))


if __name__ == "__main__":
    main()
