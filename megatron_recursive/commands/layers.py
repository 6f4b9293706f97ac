"""``megatron-recursive layers``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_recursive.command_line import command, example
from megatron_recursive.commands import shared
from megatron_recursive.data.hub import hub_choice
from megatron_recursive.errors import UserError

SUMMARY = "Measure what each layer of a model changes, and choose prelude, core and coda by it."
REPEATS = (2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "Block influence and angular distance of every layer, from one pass over text; where the distance becomes flat "
        "(Kneedle) the prelude ends, and where it rises the coda begins. Writes JSON, which convert import "
        "--from-analysis takes, and a picture beside it."
    )
    required = parser.add_argument_group("required")
    shared.add_model(required)
    shared.add_text(parser)
    choice = parser.add_argument_group("choice of layers")
    choice.add_argument("--target-recurrent-size", type=int, metavar="N",
                        help="keep the N most influential layers of the middle (default: all)")
    choice.add_argument("--loop-windows", type=int, nargs="*", metavar="SIZE", help="also a plain model's loss with "
                        "each window of so many layers looped 2 and 4 times in mean steps (none: the core, a third)")
    choice.add_argument("--loop-samples", type=int, default=8, help="samples for --loop-windows")
    shared.add_measuring(parser, "runs/layers.json")
    # fmt: on
    parser.epilog = example("layers", "--model", "MODEL", "--target-recurrent-size", "8", "--loop-windows")


def run(args: argparse.Namespace) -> None:
    shared.prepare(args)
    from megatron_recursive.analysis.subject import open_subject
    from megatron_recursive.plots.layer_scores import plot_layer_scores

    with open_subject(args.model, args.tokenizer, args.device) as loaded:
        record = analyze(args, loaded)
    shared.finish(args, record, table, plot_layer_scores)
    if record["kind"] == "donor" and not args.json:
        words = ["convert", "import", "--hf", args.model, "--out", "CKPT", "--from-analysis", args.output]
        print(f"Make it recurrent with these layers:\n{command(*words)}")


def analyze(args: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    """The record that is written; section 11 of the guide documents it."""
    from tqdm import tqdm

    from megatron_recursive.analysis.layer_scores import looped, mean_loss, score_layers
    from megatron_recursive.analysis.stacks import find_stacks
    from megatron_recursive.analysis.subject import layers_of, text_rows
    from megatron_recursive.plots.records import head

    model, layers = loaded.model, layers_of(loaded.model)
    length = shared.length_of(args, loaded)
    if wrong := [size for size in args.loop_windows or () if not 1 <= size <= len(layers)]:
        raise UserError(f"--loop-windows {wrong[0]} must lie between 1 and the model's {len(layers)} layers.")
    if args.loop_windows is not None and loaded.recursive:
        raise UserError(f"--loop-windows asks a model that does not loop yet, but {loaded.name} does; leave it out.")
    rows = text_rows(loaded.text, args.text, args.num_samples, length, args.json_key, hub_choice(args)).to(model.device)
    batches = tqdm(rows.split(args.batch_size), "layers", unit="batch", disable=None)  # None: only on a terminal
    scores = score_layers(layers, lambda ids: model(input_ids=ids, use_cache=False, logits_to_keep=1), batches)
    stacks = find_stacks(scores.distance, scores.influence, args.target_recurrent_size)
    record = {
        **head("layers"), "model": args.model,
        "kind": shared.kind_of(loaded, "donor"),
        "text": args.text or "CPython", "samples": len(rows), "sequence_length": length, **stacks,
        "layers": [{"layer": at, "influence": influence, "distance": distance, "applied": applied}
                   for at, (influence, distance, applied) in
                   enumerate(zip(scores.influence, scores.distance, scores.applied, strict=True))],
    }  # fmt: skip
    if args.loop_windows is None:
        return record
    some = rows[: args.loop_samples].split(args.batch_size)

    def loss() -> float:
        return mean_loss(lambda ids: model(input_ids=ids, use_cache=False).logits, some)

    sizes = args.loop_windows or sorted({len(stacks["core"]), max(len(layers) // 3, 1)})
    windows = [(first, first + size) for size in sizes for first in range(len(layers) - size + 1)]
    losses: dict[tuple[int, int], dict[str, float]] = {window: {} for window in windows}
    for window, repeats in tqdm([(w, r) for w in windows for r in REPEATS], "windows", disable=None):
        with looped(layers[slice(*window)], repeats):
            losses[window][str(repeats)] = loss()
    return record | {"loop_windows": {
        "samples": sum(map(len, some)), "loss": loss(),
        "windows": [{"first": first, "last": stop - 1, "loss": losses[first, stop]} for first, stop in windows],
    }}  # fmt: skip


def table(record: dict[str, Any]) -> list[str]:
    stack_of = {layer: name for name in ("prelude", "core", "coda", "left_out") for layer in record[name]}
    lines = [f"{record['model']}: {record['samples']} samples of {record['sequence_length']} tokens", "",
             "layer  influence  distance  stack"]  # fmt: skip
    lines += [f"{at:5d}  {each['influence']:9.4f}  {each['distance']:8.4f}  {stack_of[at].replace('_', ' ')}"
              for at, each in enumerate(record["layers"])]  # fmt: skip
    thirds = [name for name, how in record["boundaries"].items() if how == "third"]
    lines += [f"no knee bounds the {' and the '.join(thirds)}: a third of the layers, at most"] if thirds else []
    if "loop_windows" in record:
        found = record["loop_windows"]
        ranked = sorted(found["windows"], key=lambda each: (each["last"] - each["first"], each["loss"]["4"]))
        lines += ["", f"loss with a window looped in mean steps, the best of a size first (once: {found['loss']:.4f})",
                  "window      x 2     x 4"]  # fmt: skip
        lines += [f"{each['first']:3d}-{each['last']:<3d}  {each['loss']['2']:7.4f} {each['loss']['4']:7.4f}"
                  for each in ranked]  # fmt: skip
    return lines
