"""Flags that several commands have alike, what they open by them, and how they end: a record, its picture, a table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.commands.asked import check
from megatron_recursive.data.hub import add_hub_flags, hub_choice
from megatron_recursive.errors import UserError

DEVICES = ("auto", "cuda", "cpu")
EXITS = ("halting", "quantile", "output-change", "kl", "argmax")
Table = Callable[[dict[str, Any]], Sequence[str]]


def add_model(group: Any, what: str = "", nargs: str | None = None) -> None:
    """--model; ``what`` it takes besides folders and checkpoints, or in their place."""
    what = what or "a Hugging Face folder, a .gguf file, a name in the hub's cache, or a Megatron checkpoint"
    group.add_argument("--model", required=True, nargs=nargs, metavar="DIR_OR_CKPT", help=what)


def add_tokenizer(group: Any) -> None:
    group.add_argument("--tokenizer", metavar="DIR", help="a folder, or a hub name (default: the model's)")


def add_device(group: Any) -> None:
    group.add_argument("--device", choices=DEVICES, help="default: MEGATRON_RECURSIVE_DEVICE of the environment, or "
                       "auto: a GPU where there is one")  # fmt: skip


def add_depth(group: Any, exits: Sequence[str] = EXITS, default: str = "none leaves") -> None:
    """The flags of blocks and exits."""
    # fmt: off
    group.add_argument("--num-refinement-blocks", type=int, metavar="T", help="run T blocks (default: as trained)")
    group.add_argument("--exit", choices=exits, help=f"by what a token leaves after its own block (default: {default})")
    group.add_argument("--halt-threshold", type=float,
                       help="--exit halting: probability at which a token leaves (default: the model's)")
    group.add_argument("--exit-threshold", type=float,
                       help="--exit output-change or kl: leave below this change (default: 0.03 or 0.001); --exit "
                       "quantile: at this probability of having left, by the exit gate (default: 0.5)")
    # fmt: on


def add_text(parser: argparse.ArgumentParser, more: str = "") -> Any:
    """The flags of those that measure a model on text; ``more``: what --text may name besides."""
    text = parser.add_argument_group("text")
    text.add_argument("--text", nargs="+", default=[], metavar="PATH", help="documents, as preprocess reads them: "
                      f"files, folders, hf://NAME{more} (default: what `corpus` holds out of the text that Python "
                      "ships, 180 thousand characters)")  # fmt: skip
    text.add_argument("--json-key", default="text", metavar="KEY", help="key or column of the text")
    add_hub_flags(text.add_argument)
    text.add_argument("--num-samples", type=int, default=256, help="samples at most")
    text.add_argument("--seq-length", type=int, help="tokens of a sample (default: 256, at most the model's)")
    text.add_argument("--batch-size", type=int, default=4, help="samples at a time")
    return text


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """The flags of :func:`opened`."""
    text = add_text(parser, ", or alone the PREFIX of token files (of those that a "
                    "checkpoint was trained on, what its --split held out)")
    text.add_argument("--data-seed", type=int, default=1234, help="of a PREFIX: --seed of the training, which orders "
                      "its documents")  # fmt: skip
    text.add_argument("--answer-tokens", type=int, metavar="N", help="as in training: tokens from N on are answers")


def add_measuring(parser: argparse.ArgumentParser, output: str, picture: bool = True) -> None:
    """The flags of those that measure a model, and :func:`prepare`."""
    rest = parser.add_argument_group("tokenizer, device and output")
    add_tokenizer(rest)
    add_device(rest)
    add_output(rest, output, picture)


def add_output(group: Any, default: str | None = None, picture: bool = True) -> None:
    """The flags of :func:`finish`; with a default a picture may stand beside the file."""
    what = "also write the JSON into a file" if default is None else "JSON" + "; the picture is beside it" * picture
    group.add_argument("--output", default=default, metavar="FILE", help=what)
    group.add_argument("--json", action="store_true", help="print one JSON object, that of --output, and no table")


def prepare_transformers() -> None:
    """Before transformers is imported: no warnings, no network, and bars only where somebody sees them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def prepare(args: argparse.Namespace) -> None:
    """Refuse what cannot be, before anything heavy is imported."""
    check(args)
    if Path(args.output).suffix != ".json":
        raise UserError(f"--output {args.output} must end with .json; the picture gets its name, with .png.")
    if any(each.startswith("hf://") for each in args.text):
        os.environ.setdefault("HF_HUB_OFFLINE", "0")  # the model comes from the cache all the same
    prepare_transformers()


def length_of(args: argparse.Namespace, loaded: Any) -> int:
    """Tokens of a sample."""
    most = loaded.max_positions or 2**31
    length = int(args.seq_length or min(256, most))
    if not 2 <= length <= most:
        raise UserError(f"--seq-length {length} must lie between 2 and the {most} positions of the model.")
    return length


def kind_of(loaded: Any, plain: str = "plain") -> str:
    """A model in the words of records."""
    return "checkpoint" if hasattr(loaded.model, "megatron") else "recursive" if loaded.recursive else plain


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
            asked = args.num_samples, length, args.data_seed
            rows = torch.from_numpy(held_out_rows(prefix, *asked, loaded.trained, name))
        else:
            hub = hub_choice(args)
            rows = text_rows(loaded.text, args.text, args.num_samples, length, args.json_key, hub, ahead=1)
        largest, size = int(rows.max()), loaded.model.config.vocab_size
        if largest >= size:
            raise UserError(f"--text has the token id {largest}, but {name} has {size} tokens; give its own text.")
        yield loaded, rows.to(loaded.model.device)


def finish(
    args: argparse.Namespace, record: dict[str, Any], table: Table,
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:  # fmt: skip
    """Write the record into --output, and its picture beside it; print it, or its table and the files."""
    from megatron_recursive.data.files import write_json

    files = [Path(args.output)] if args.output else []
    if files:
        write_json(files[0], record)
    if draw is not None:
        files.append(files[0].with_suffix(".png"))
        draw(record, files[1])
    told = ["", " and ".join(map(str, files))] if files else []
    print(json.dumps(record) if args.json else "\n".join([*table(record), *told]))
