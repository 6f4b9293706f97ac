"""``megatron-recursive sweep``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.commands import shared
from megatron_recursive.commands.evaluate import depth_list
from megatron_recursive.figures import aligned

SUMMARY = "Measure held-out text at many depths of one or several models, and what leaving early would cost."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "Loss, perplexity and accuracy of held-out text by depth, from one run of the deepest; at which depth answers "
        "settle; and loss against mean depth and FLOPs for each way to leave early. One process reads a checkpoint of "
        "any layout. Writes JSON, and a picture beside it; a command that was killed goes on when it is given again."
    )
    required = parser.add_argument_group("required")
    shared.add_model(required, nargs="+")
    shared.add_held_out(parser)
    depth = parser.add_argument_group("depths and exits")
    depth.add_argument("--depths", type=depth_list, default=(1, 2, 4, 8, 16, 32, 64), metavar="T,T,...",
                       help="blocks, loops or recurrences; the trained depth is added (default: 1,2,4,...,64)")
    depth.add_argument("--mean-depth", type=float, metavar="X", help="also the threshold of each exit for this mean")
    depth.add_argument("--measure-exits", action="store_true", help="also run the model itself under every exit; a "
                       "checkpoint reads token by token then")
    shared.add_measuring(parser, "runs/sweep.json")
    # fmt: on
    parser.epilog = example("sweep", "--model", "CKPT", "DIR", "--text", "heldout.jsonl", "--mean-depth", "2.5")


def run(args: argparse.Namespace) -> None:
    shared.prepare(args)
    parts = Path(f"{args.output}.parts")
    from megatron_recursive.data.work_folder import holding
    from megatron_recursive.plots.depth_sweep import plot_depth_sweep
    from megatron_recursive.plots.records import head

    with holding(parts, f"--output {args.output}"):
        record: dict[str, Any] = {
            **head("sweep"), "text": args.text or "CPython",
            "models": [_of_model(args, name, parts) for name in args.model],
        }  # fmt: skip
        shared.finish(args, record, tables, plot_depth_sweep)
        shutil.rmtree(parts, ignore_errors=True)


def _of_model(args: argparse.Namespace, name: str, parts: Path) -> dict[str, Any]:
    from megatron_recursive.analysis import depth_sweep, exit_frontier
    from megatron_recursive.analysis.depth_walk import walker_of
    from megatron_recursive.analysis.subject import fingerprint

    with shared.opened(args, name) as (loaded, rows):
        model = walker_of(loaded)
        depths = sorted({*(() if model.has_own_passes else args.depths), model.plan.depth})
        if model.has_own_passes and set(args.depths) - set(depths):
            print(f"{name} has adapters for each of its passes: only depth {model.plan.depth} can be measured.",
                  file=sys.stderr)  # fmt: skip
        asked = depth_sweep.Sweep(model, depths, rows, args.batch_size, args.answer_tokens)
        found = depth_sweep.run(asked, parts, f"{name} {fingerprint(name)}")
        return {
            "model": name, "kind": shared.kind_of(loaded), "samples": len(rows), "sequence_length": rows.shape[1] - 1,
            **depth_sweep.record_of(asked, found),
            "exits": exit_frontier.frontier(asked, found, args.mean_depth, args.measure_exits),
        }  # fmt: skip


def tables(record: dict[str, Any]) -> list[str]:
    return [line for each in record["models"] for line in [*table(each), ""]][:-1]


def table(record: dict[str, Any]) -> list[str]:
    settled, sharing = record["settled"], record["sharing"]
    share_of = {each["depth"]: each["share"] for each in settled["shares"]}
    lines = [
        "{model}: {family}, trained depth {trained_depth}; {samples} samples, {tokens:,} tokens".format_map(record), "",
        *aligned(["depth", "passes", "loss", "+-", "perplexity", "accuracy", "settled", "MFLOPs a token"],
                     [[f"{each['depth']}", f"{each['passes']}", f"{each['loss']:.4f}",
                       f"{each['standard_error']:.4f}" if each["standard_error"] else "",
                       f"{each['perplexity']:.2f}", f"{each['accuracy']:.4f}", f"{share_of[each['depth']]:.1%}",
                       _mega(each["flops_per_token"])]
                      for each in record["depths"]]),
        "", f"{sharing['passes']} passes for {sharing['passes_separately']} run separately; a batch took "
        f"{sharing['seconds']:.2f} s for {sharing['seconds_separately']:.2f} s, losses the same within "
        f"{sharing['largest_difference']:.1e}",
    ]  # fmt: skip
    if sharing["alone"]:
        alone = ", ".join(map(str, sharing["alone"]))
        lines.append(f"depths {alone} ran separately: they compute other passes than the deepest")
    for name in ("frequency", "position"):
        bands = (f"{each['from']}-{each['to']}: {each['mean_depth']:.2f}" for each in settled[f"by_{name}"])
        lines.append(f"answers settle at depth {settled['mean_depth']:.2f}, by {name} {', '.join(bands)}")
    rows = [[exit, f"{each['threshold']:.4g}", f"{each['mean_depth']:.2f}", f"{each['loss']:.4f}",
             _mega(each["flops_per_token"]), "asked" if each is found.get("asked") else "",
             "{loss:.4f} at {mean_depth:.2f}".format_map(each["measured"]) if "measured" in each else ""]
            for exit, found in record["exits"].items()
            for each in [*found["points"], *([found["asked"]] if "asked" in found else [])]]  # fmt: skip
    heads = ["exit", "threshold", "mean depth", "loss", "MFLOPs a token", "", "measured"]
    return [*lines, "", *(aligned(heads, rows) if rows else ["no exits, which need refinement blocks that are alike"])]


def _mega(flops: float | None) -> str:
    return "" if flops is None else f"{flops / 1e6:,.2f}"
