"""``megatron-recursive sweep``."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.commands.evaluate import depth_list
from megatron_recursive.commands.layers import add_output, add_text, length_of, prepare
from megatron_recursive.data.hub import hub_choice
from megatron_recursive.errors import UserError
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
    required.add_argument("--model", required=True, nargs="+", metavar="DIR_OR_CKPT", help="Hugging Face folders, "
                          ".gguf files, names in the hub's cache, or Megatron checkpoints")
    add_held_out(parser)
    depth = parser.add_argument_group("depths and exits")
    depth.add_argument("--depths", type=depth_list, default=(1, 2, 4, 8, 16, 32, 64), metavar="T,T,...",
                       help="blocks, loops or recurrences; the trained depth is added (default: 1,2,4,...,64)")
    depth.add_argument("--mean-depth", type=float, metavar="X", help="also the threshold of each exit for this mean")
    depth.add_argument("--measure-exits", action="store_true", help="also run the model itself under every exit; a "
                       "checkpoint reads token by token then")
    add_output(parser, "runs/sweep.json")
    # fmt: on
    parser.epilog = example("sweep", "--model", "CKPT", "DIR", "--text", "heldout.jsonl", "--mean-depth", "2.5")


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """The flags of :func:`opened`."""
    text = add_text(parser, ", or alone the PREFIX of training's token files")
    text.add_argument("--data-seed", type=int, default=1234, help="of a PREFIX: --seed of the training, which orders "
                      "its documents")  # fmt: skip
    text.add_argument("--answer-tokens", type=int, metavar="N", help="as in training: tokens from N on are answers")


def run(args: argparse.Namespace) -> None:
    (output, picture), parts = prepare(args), Path(f"{args.output}.parts")
    from megatron_recursive.data.files import replacing
    from megatron_recursive.plots.depth_sweep import plot_depth_sweep
    from megatron_recursive.plots.records import head

    record: dict[str, Any] = {
        **head("sweep"), "text": args.text or "CPython",
        "models": [_of_model(args, name, parts) for name in args.model],
    }  # fmt: skip
    with replacing(output) as (partial,):
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot_depth_sweep(record, picture)
    shutil.rmtree(parts, ignore_errors=True)
    lines = [line for each in record["models"] for line in [*table(each), ""]]
    print(json.dumps(record) if args.json else "\n".join([*lines, f"{output} and {picture}"]))


def _of_model(args: argparse.Namespace, name: str, parts: Path) -> dict[str, Any]:
    from megatron_recursive.analysis import depth_sweep, exit_frontier
    from megatron_recursive.analysis.depth_walk import walker_of
    from megatron_recursive.analysis.subject import fingerprint

    with opened(args, name) as (loaded, rows):
        model = walker_of(loaded)
        depths = sorted({*args.depths, model.plan.depth})
        kind = "checkpoint" if hasattr(loaded.model, "megatron") else "recursive" if loaded.recursive else "plain"
        asked = depth_sweep.Sweep(model, depths, rows, args.batch_size, args.answer_tokens)
        found = depth_sweep.run(asked, parts, f"{name} {fingerprint(name)}")
        return {
            "model": name, "kind": kind, "samples": len(rows), "sequence_length": rows.shape[1] - 1,
            **depth_sweep.record_of(asked, found),
            "exits": exit_frontier.frontier(asked, found, args.mean_depth, args.measure_exits),
        }  # fmt: skip


@contextlib.contextmanager
def opened(args: argparse.Namespace, name: str) -> Iterator[tuple[Any, Any]]:
    """A model, and the rows of its text, each with the token behind it."""
    import torch

    from megatron_recursive.analysis.subject import open_subject, text_rows
    from megatron_recursive.data.indexed import held_out_rows

    prefix = next((each for each in args.text if Path(f"{each}.idx").is_file()), None)
    if prefix is not None and len(args.text) > 1:
        raise UserError(f"--text {prefix} is a token file, which stands alone; give one, or documents.")
    with open_subject(name, args.tokenizer, args.device, numbers=prefix is not None) as loaded:
        length = length_of(args, loaded)
        if prefix is not None:
            rows = torch.from_numpy(held_out_rows(prefix, args.num_samples, length, args.data_seed))
        else:
            hub = hub_choice(args)
            rows = text_rows(loaded.text, args.text, args.num_samples, length, args.json_key, hub, ahead=1)
        largest, size = int(rows.max()), loaded.model.config.vocab_size
        if largest >= size:
            raise UserError(f"--text has the token id {largest}, but {name} has {size} tokens; give its own text.")
        yield loaded, rows.to(loaded.model.device)


def table(record: dict[str, Any]) -> list[str]:
    settled, sharing = record["settled"], record["sharing"]
    share_of = {each["depth"]: each["share"] for each in settled["shares"]}
    lines = [
        "{model}: {family}, trained depth {trained_depth}; {samples} samples, {tokens:,} tokens".format_map(record), "",
        *aligned(["depth", "passes", "loss", "perplexity", "accuracy", "settled", "MFLOPs a token"],
                     [[f"{each['depth']}", f"{each['passes']}", f"{each['loss']:.4f}", f"{each['perplexity']:.2f}",
                       f"{each['accuracy']:.4f}", f"{share_of[each['depth']]:.1%}", _mega(each["flops_per_token"])]
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
