"""Say in a few lines what a run trained and what came out, from its metrics.jsonl."""

from __future__ import annotations

import argparse

from megatron_recursive.errors import report_user_errors
from megatron_recursive.plots.run_summary import summarize_run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Say what was trained, the losses at the start and at the end, the held-out loss after each "
        "refinement block, and which health alarms spoke.",
    )
    parser.add_argument("--metrics", required=True, metavar="FILE", help="metrics.jsonl of a run")
    return parser.parse_args()


@report_user_errors
def main() -> None:
    print(summarize_run(parse_args().metrics))


if __name__ == "__main__":
    main()
