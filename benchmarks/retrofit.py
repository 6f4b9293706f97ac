"""The table of a retrofit's ablation: each arm before and after, by depth, with what it costs to train and to run.

    python benchmarks/retrofit.py runs/ablations/retrofit

Runs with every arm's flags, one after another: an evaluation of the untrained conversion, two steps for the peak
memory, and a greedy answer of 64 tokens from the trained weights of its best rate. Writes NAME.json and NAME.md beside
this file: the ablation's results, and above them the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-m", "megatron_recursive"]
DEPTH = "lm loss depth "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output of the ablation")
    args = parser.parse_args()
    figures: dict[str, Any] = json.loads((args.folder / "results.json").read_text())
    rows: list[list[str]] = []
    for arm in figures["arms"]:
        runs = [run for run in figures["runs"] if run["arm"] == arm["arm"] and run["lr"] == arm["lr"]]
        if not runs:
            continue
        arm["retrofit"] = found = {
            "untrained": evaluation(runs[0]), "peak_memory_mib": peak_memory(runs[0]),
            "parameters": parameters(runs[0]), "tokens_per_second": speed(runs[0]),
        }  # fmt: skip
        rows.append([
            arm["arm"], f"{arm['lr']:g}", str(len(runs)), f"{found['parameters'] / 1e6:.2f} M",
            by_depth([found["untrained"]]), by_depth([run["held out"] for run in runs]),
            f"{runs[0]['tokens']:,}", f"{runs[0]['FLOPs'] / 1e12:.1f} T", f"{found['peak_memory_mib']:,.0f} MiB",
            f"{fmean(run['seconds'] for run in runs):.0f} s", f"{found['tokens_per_second']:.0f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["arm", "rate", "seeds", "parameters", "untrained", "trained", "tokens", "FLOPs", "peak memory",
            "training time", "generated tokens/s"]  # fmt: skip
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    lines.insert(1, "|---" * len(head) + "|")
    name = args.folder.name
    said = (
        "The first arm, untrained, is the donor. Held-out loss at depths 1, 2, 4, 8 (those that an arm can run), mean "
        "over the seeds; peak memory is the resident one of the training process; times beside other work, so that "
        "only their order is to be read."
    )
    text = (args.folder / "results.md").read_text().replace("(results.png)", f"({name}.png)")
    (HERE / f"{name}.md").write_text("\n".join([said, "", *lines, "", text]))
    (HERE / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def by_depth(found: list[dict[str, float]]) -> str:
    names = sorted((name for name in found[0] if name.startswith(DEPTH)), key=lambda name: int(name[len(DEPTH) :]))
    return ", ".join(f"{fmean(each[name] for each in found):.3f}" for name in names)


def flags(run: dict[str, Any], folder: str, *more: str) -> list[str]:
    """The words of a run, into another folder."""
    words = shlex.split(run["command"])[1:]
    for name in ("--save", "--load", "--data-cache-path"):
        del words[words.index(name) : words.index(name) + 2]
    words += ["--data-cache-path", f"{folder}/cache", "--metrics-file", f"{folder}/metrics.jsonl"]
    return [*PROGRAM, *words, *more]


def evaluation(run: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(flags(run, folder, "--skip-train"), check=True, capture_output=True)
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {name: value for name, value in records[-1].items() if name.startswith("lm loss")}


def peak_memory(run: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        job = subprocess.Popen(
            flags(run, folder, "--exit-interval", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(job.pid, 0)
    if status:
        raise SystemExit(f"two steps of {run['arm']} failed")
    return usage.ru_maxrss / 1024


def parameters(run: dict[str, Any]) -> int:
    said = subprocess.run([*PROGRAM, "count", "--model", run["folder"], "--json"], check=True, capture_output=True)
    return int(json.loads(said.stdout)["parameters"]["held"]["total"])


def speed(run: dict[str, Any]) -> float:
    words = ["generate", "--model", run["folder"], "--prompt", "The function returns", "--max-tokens", "64", "--json"]
    said = subprocess.run([*PROGRAM, *words], check=True, capture_output=True, text=True)
    return float(json.loads(said.stdout.splitlines()[-1])["tokens_per_second"])


if __name__ == "__main__":
    main()
