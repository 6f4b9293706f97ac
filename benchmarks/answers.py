"""Right answers of an ablation's runs on their task, by level and block, beside the ablation's own results.

    python benchmarks/answers.py runs/ablations/hops [--halt-threshold 0.95]

Reads the held-out documents with every run that is done at its arm's best rate, as ``megatron-recursive task evaluate``
does. Writes NAME.json, NAME.md and NAME.png beside this file: the ablation's results, and under them the share of right
answers, mean (lowest) over the seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_recursive.commands.shared import prepare_transformers

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output of an ablation")
    parser.add_argument("--halt-threshold", type=float, default=0.95, help="probability at which a token leaves")
    args = parser.parse_args()
    prepare_transformers()
    figures: dict[str, Any] = json.loads((args.folder / "results.json").read_text())
    best = {arm["arm"]: arm["lr"] for arm in figures["arms"]}
    runs = [run for run in figures["runs"] if run["lr"] == best[run["arm"]]]
    rows: list[list[str]] = []
    for arm in best:
        mine = [run | {"answers": answers(run, args.halt_threshold)} for run in runs if run["arm"] == arm]
        for run in mine:
            next(each for each in figures["runs"] if each["folder"] == run["folder"])["answers"] = run["answers"]
        if mine:
            rows += table(arm, [run["answers"] for run in mine])
    name = args.folder.name
    leaving = [f"leaving at {args.halt_threshold:g}", "mean exit block"]
    head = ["arm", "level", "seeds", "after each block", "whole documents", *leaving]
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    lines.insert(1, "|---" * len(head) + "|")
    text = (args.folder / "results.md").read_text().replace("(results.png)", f"({name}.png)")
    said = f"Right answers, mean (lowest) over the seeds; `python benchmarks/answers.py {args.folder}`:"
    (HERE / f"{name}.md").write_text("\n".join([text, said, "", *lines, ""]))
    (HERE / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    shutil.copyfile(args.folder / "results.png", HERE / f"{name}.png")
    print("\n".join(lines))


def answers(run: dict[str, Any], threshold: float) -> list[dict[str, Any]]:
    """The rows of ``task evaluate`` for a run."""
    from megatron_recursive.inference.answers import evaluate
    from megatron_recursive.inference.generation import Settings
    from megatron_recursive.inference.loading import open_model

    words = run["command"].split()
    with open_model(run["folder"], num_refinement_blocks=None, numbers=True) as loaded:
        exits = loaded.recursive and loaded.model.config.has_halting
        settings = Settings(exit="halting", halt_threshold=threshold) if exits else Settings(exit=None)
        return evaluate(loaded, words[words.index("--valid-data-path") + 1], settings)[1]


def table(arm: str, seeds: list[list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for each in zip(*seeds, strict=True):
        blocks = [spread(block) for block in zip(*(row["accuracy"] for row in each), strict=True)]
        exits = [row for row in each if "exit block" in row]
        rows.append([
            arm, str(each[0]["level"] or "all"), str(len(each)), ", ".join(blocks),
            spread(row["whole"] for row in each),
            spread([row["exit accuracy"] for row in exits]) if exits else "-",
            f"{fmean(row['exit block'] for row in exits):.2f}" if exits else "-",
        ])  # fmt: skip
    return rows


def spread(given: Any) -> str:
    values = list(given)
    return f"{fmean(values):.3f} ({min(values):.3f})"


if __name__ == "__main__":
    main()
