"""``megatron-recursive health``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.commands import shared
from megatron_recursive.errors import UserError
from megatron_recursive.figures import aligned

SUMMARY = "Examine a recursive model on text: its states by pass, its heads, and whether it uses the states."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "How far each pass moves its state, how alike tokens are there, and what the head would say; the loss with the "
        "state reset before the last blocks, and with one block more; whether halting probabilities hold, and where "
        "tokens leave. Writes JSON, and a picture beside it."
    )
    required = parser.add_argument_group("required")
    shared.add_model(required, "a recursive model: a Hugging Face folder, or a Megatron checkpoint")
    # fmt: on
    shared.add_held_out(parser)
    shared.add_measuring(parser, "runs/health.json")
    parser.epilog = example("health", "--model", "CKPT", "--text", "heldout.jsonl", "--num-samples", "64")


def run(args: argparse.Namespace) -> None:
    shared.prepare(args)
    from megatron_recursive.analysis.depth_sweep import Sweep
    from megatron_recursive.analysis.depth_walk import walker_of
    from megatron_recursive.analysis.health import examine
    from megatron_recursive.plots.health import plot_health
    from megatron_recursive.plots.records import head

    record: dict[str, Any] = {**head("health"), "model": args.model, "text": args.text or "CPython"}
    with shared.opened(args, args.model) as (loaded, rows):
        if not loaded.recursive:
            raise UserError(f"--model {args.model} is a plain model, which makes no states; name a recursive one.")
        record |= {"kind": shared.kind_of(loaded), "samples": len(rows), "sequence_length": rows.shape[1] - 1}
        record |= examine(Sweep(walker_of(loaded), [], rows, args.batch_size, args.answer_tokens))
    shared.finish(args, record, table, plot_health)


def table(record: dict[str, Any]) -> list[str]:
    heads = ["pass", "block", "stack", "moves", "change", "token cosine", "loss", "accuracy", "agrees"]
    rows = [[f"{each['pass']}", f"{each['block']}", each["stack"], each["target"], _said(each["change"]),
             _said(each["token_cosine"]), *(_said(each.get(key)) for key in ("loss", "accuracy", "agrees"))]
            for each in record["passes"]]  # fmt: skip
    lines = ["{model}: {family}, depth {depth}; {samples} samples, {tokens:,} tokens".format_map(record), "",
             *aligned(heads, rows), ""]  # fmt: skip
    tried = {f"the state reset before the last {each['remaining']}": each for each in record.get("reset", ())}
    if (more := record.get("one_more")) is not None:
        tried[f"one more, which moves the output by {_said(more['distance'])}"] = more
    lines += [f"loss with {what}: {each['loss']:.4f} ({each['loss'] - record['loss']:+.4f} +- "
              f"{_said(each['standard_error']) or '-'})" for what, each in tried.items()]  # fmt: skip
    for exit, found in record.get("exits", {}).items():
        shares = ", ".join(f"{each['block']}: {each['share']:.1%}" for each in found["blocks"])
        lines.append(f"exit {exit} at {found['threshold']:g}: accuracy {found['accuracy']:.4f}, where early "
                     f"{_said(found['early']['accuracy']) or 'none'}; leave after {shares}")  # fmt: skip
    if "calibration" in record:
        found = record["calibration"]
        bins = (f"{each['probability']:.2f}: {each['right']:.2f}" for each in found["bins"])
        lines.append(f"halting, probability: share right ({found['halt_target']}): {', '.join(bins)}; expected "
                     f"calibration error {found['expected_error']:.4f}")  # fmt: skip
    return lines + [f"left out: {name} ({why})" for name, why in record["left_out"].items()]


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
