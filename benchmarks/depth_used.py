"""Does depth do anything? Held-out loss at equal tokens: recursive, recursion off, and plain GPTs of equal compute.

    python benchmarks/depth_used.py --data runs/default --seeds 1 2 3 --jobs 2

Every run goes through the pretraining command; a finished run is not done again and a killed one resumes from its
checkpoint, so that the same command carries on. Writes depth_used.json, .md and .png beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.accounting import ModelShape, count_parameters, flops_per_token
from megatron_recursive.errors import UserError, report_user_errors
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plots.metrics_file import read_records

HERE = Path(__file__).parent
ROOT = HERE.parent
LAYERS, BLOCKS, LATENTS = 2, 3, 2
WIDTH, FFN, HEADS, SEQUENCE, BATCH = 128, 384, 4, 128, 8
OFF = ("--disable-recursive-refinement",)
DEPTH = ("--num-refinement-blocks", str(BLOCKS), "--num-latent-refinements", str(LATENTS))


@dataclass(frozen=True)
class Arm:
    """One model of the comparison."""

    name: str
    layers: int
    flags: tuple[str, ...]
    plan: RecursionPlan


def plan_of(**knobs: Any) -> RecursionPlan:
    return build_plan(RecursionConfig(**knobs).resolved(embedding_init_std=0.02))


def shape_of(layers: int, vocabulary: int) -> ModelShape:
    return ModelShape(num_layers=layers, hidden_size=WIDTH, ffn_hidden_size=FFN, num_attention_heads=HEADS,
                      num_query_groups=HEADS, kv_channels=WIDTH // HEADS, vocab_size=vocabulary, seq_length=SEQUENCE,
                      gated_linear_unit=True, linear_bias=False, norm_bias=False)  # fmt: skip


def arms(vocabulary: int) -> list[Arm]:
    """The models; the plain ones of equal compute get the number of layers whose training FLOPs come nearest."""
    core = {"num_refinement_blocks": BLOCKS, "num_latent_refinements": LATENTS}
    detached, full = plan_of(**core), plan_of(**core, detach_between_refinements=False)
    plain = plan_of(enable_recursive_refinement=False)

    def layers_like(plan: RecursionPlan) -> int:
        goal = flops_per_token(shape_of(LAYERS, vocabulary), plan)
        wanted = goal.passes_forward + goal.passes_backward

        def distance(layers: int) -> float:
            flops = flops_per_token(shape_of(layers, vocabulary), plain)
            return abs(flops.passes_forward + flops.passes_backward - wanted)

        return min(range(1, 200), key=distance)

    return [
        Arm("recursive, last block's gradient", LAYERS, DEPTH, detached),
        Arm("recursive, full gradient", LAYERS, (*DEPTH, "--no-detach-between-refinements"), full),
        Arm("the same layers, recursion off", LAYERS, OFF, plain),
        Arm("plain GPT of the first's compute", layers_like(detached), OFF, plain),
        Arm("plain GPT of the second's compute", layers_like(full), OFF, plain),
    ]


def train(arm: Arm, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one arm with one seed, unless that is done; returns its last held-out metrics."""
    number = [a.name for a in arms(args.vocabulary)].index(arm.name)
    folder = Path(args.runs) / f"arm{number}_seed{seed}"
    metrics = folder / "metrics.jsonl"
    done = [r for r in read_records(metrics) if r["kind"] == "test"] if metrics.exists() else []
    if not done:
        folder.mkdir(parents=True, exist_ok=True)
        data = Path(args.data)
        command = [
            sys.executable, str(ROOT / "examples/recursive_gpt/pretrain_recursive_gpt.py"),
            "--num-layers", arm.layers, "--hidden-size", WIDTH, "--ffn-hidden-size", FFN, "--swiglu",
            "--num-attention-heads", HEADS, "--disable-bias-linear", "--normalization", "RMSNorm",
            "--position-embedding-type", "rope", "--seq-length", SEQUENCE, "--max-position-embeddings", SEQUENCE,
            "--hidden-dropout", 0, "--attention-dropout", 0, "--seed", seed,
            "--train-data-path", data / "data/train", "--valid-data-path", data / "data/valid",
            "--test-data-path", data / "data/valid", "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", data / "tokenizer", "--num-workers", 0, "--data-cache-path", folder / "cache",
            "--micro-batch-size", BATCH, "--global-batch-size", BATCH, "--train-iters", args.iterations,
            "--lr", args.lr, "--min-lr", args.lr / 10, "--lr-decay-style", "cosine", "--lr-warmup-iters", 30,
            "--clip-grad", 1.0, "--weight-decay", 0.1, "--adam-beta2", 0.95, "--log-interval", 20,
            "--eval-interval", 100_000, "--eval-iters", 50, "--save", folder, "--load", folder,
            "--save-interval", 200, "--no-save-rng", "--no-load-rng", *arm.flags,
        ]  # fmt: skip
        with open(folder / "log.txt", "a") as log:
            result = subprocess.run([str(c) for c in command], stdout=log, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        if result.returncode:
            raise UserError(f"training '{arm.name}' with seed {seed} failed; see {folder / 'log.txt'}.")
        done = [r for r in read_records(metrics) if r["kind"] == "test"]
    last = done[-1]
    print(f"{arm.name}, seed {seed}: held-out lm loss {last['lm loss']:.4f}", flush=True)
    return {k: v for k, v in last.items() if "loss" in k}


def summarize(args: argparse.Namespace, results: dict[tuple[str, int], dict[str, float]]) -> dict[str, Any]:
    """Mean and spread of each arm over the seeds, with what it costs."""
    rows = []
    for arm in arms(args.vocabulary):
        losses = [results[arm.name, seed]["lm loss"] for seed in args.seeds]
        shape = shape_of(arm.layers, args.vocabulary)
        rows.append({
            "arm": arm.name,
            "layers": arm.layers,
            "passes": arm.plan.num_passes,
            "parameters": count_parameters(shape, arm.plan).held,
            "flops_per_token": flops_per_token(shape, arm.plan).total,
            "held_out_loss": losses,
            "mean": statistics.mean(losses),
            "spread": max(losses) - min(losses),
            "per_block": [
                statistics.mean(results[arm.name, seed][f"lm loss block {b}"] for seed in args.seeds)
                for b in range(1, arm.plan.num_blocks + 1)
            ] if not arm.plan.is_plain else [],
        })  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": f"python benchmarks/depth_used.py --data runs/default --seeds {' '.join(map(str, args.seeds))} "
                   f"--iterations {args.iterations} --lr {args.lr:g}",
        "commit": commit.stdout.strip(),
        "tokens": args.iterations * BATCH * SEQUENCE,
        "seeds": args.seeds,
        "rows": rows,
    }  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    lines = [
        "# Does depth do anything?",
        "",
        f"`{summary['command']}` at commit {summary['commit']}: {summary['tokens']:,} tokens of CPython's own English, "
        f"width {WIDTH}, {len(summary['seeds'])} seeds, the same learning rate for all. Held-out loss in nats per "
        "token; spread is largest minus smallest over the seeds.",
        "",
        "| model | layers x passes | parameters | FLOPs/token | held-out loss | spread | after each block |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        blocks = ", ".join(f"{loss:.3f}" for loss in row["per_block"]) or "-"
        lines.append(
            f"| {row['arm']} | {row['layers']} x {row['passes']} | {row['parameters']:,} | "
            f"{row['flops_per_token']:.3g} | **{row['mean']:.3f}** | {row['spread']:.3f} | {blocks} |"
        )
    return "\n".join([*lines, "", "![held-out loss](depth_used.png)", ""])


def draw(summary: dict[str, Any], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for position, row in enumerate(reversed(summary["rows"])):
        axis.plot(row["held_out_loss"], [position] * len(row["held_out_loss"]), "o", color=f"C{position}", alpha=0.6)
        axis.plot([row["mean"]], [position], "|", color=f"C{position}", ms=24, mew=2)
    axis.set_yticks(range(len(summary["rows"])), [row["arm"] for row in reversed(summary["rows"])])
    axis.set_xlabel(f"held-out loss after {summary['tokens']:,} tokens (nats per token; bar: mean over seeds)")
    axis.grid(alpha=0.3)
    figure.savefig(output, dpi=130)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", default="runs/default", help="a run of `make pretrain`: corpus and tokenizer")
    parser.add_argument("--runs", default="runs/depth_used", help="where the runs are kept (default: runs/depth_used)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=600, help="iterations of 1,024 tokens (default: 600)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one process each (default: 2)")
    args = parser.parse_args()
    if not (Path(args.data) / "data/train.idx").exists():
        raise UserError(f"--data {args.data} holds no data/train.idx; run make pretrain first.")
    args.vocabulary = 4096
    return args


@report_user_errors
def main() -> None:
    args = parse_args()
    tasks = [(arm, seed) for seed in args.seeds for arm in arms(args.vocabulary)]
    with ThreadPoolExecutor(args.jobs) as pool:
        metrics = list(pool.map(lambda task: train(*task, args), tasks))
    summary = summarize(args, {(arm.name, seed): m for (arm, seed), m in zip(tasks, metrics, strict=True)})
    (HERE / "depth_used.json").write_text(json.dumps(summary, indent=1) + "\n")
    (HERE / "depth_used.md").write_text(table(summary))
    draw(summary, HERE / "depth_used.png")
    print(table(summary))
    print(json.dumps({row["arm"]: round(row["mean"], 4) for row in summary["rows"]}))


if __name__ == "__main__":
    main()
