"""``megatron-recursive evaluate``."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from megatron_recursive.command_line import example, nearest_flag, nearest_flag_sentence
from megatron_recursive.errors import UserError

OWN = ("--model", "--depths", "--output")
SUMMARY = "Score a model or a checkpoint on the tasks of lm-eval, at one depth or several."


def add_passed_on(parser: argparse.ArgumentParser) -> None:
    """The harness's own flags, where it is installed."""
    try:
        from lm_eval._cli import HarnessCLI
    except ModuleNotFoundError:
        return
    group = parser.add_argument_group("of lm-eval run, to which all that is not above is passed on")
    for action in HarnessCLI()._subparsers.choices["run"]._actions:
        if not {"--help", "--model"} & {*action.option_strings}:
            group._add_action(action)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [options] LM-EVAL'S COMMAND LINE"
    parser.description = (
        "The command line of lm-eval, the evaluation harness, which knows one more model here: recursive takes an "
        "export, any causal model of transformers or a Megatron checkpoint, and beside the arguments of --model hf "
        "num_refinement_blocks, exit, halt_threshold, exit_threshold, exit_stable_blocks and "
        "max_inference_refinement_steps. Mean blocks and FLOPs saved are written with the results. In a clone, "
        "--include_path examples/evaluation --tasks cpython needs no network."
    )
    depth = parser.add_argument_group("model, depth and output")
    depth.add_argument("--model", metavar="DIR_OR_CKPT", help="by its path; or a kind of lm-eval's, with --model_args "
                       "(default: hf)")  # fmt: skip
    depth.add_argument("--output", metavar="PATH", help="as --output_path")
    depth.add_argument("--depths", type=depth_list, default=(), metavar="T,T,...",
                       help="run the tasks with each of these numbers of refinement blocks, print one table and write "
                       "it beside the results of --output_path (default there: runs/scores)")  # fmt: skip
    words = "--model DIR_OR_CKPT --tasks hellaswag --batch_size 8 --depths 1,2,4 --output runs/scores"
    parser.epilog = example("evaluate", *words.split())


def depth_list(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers like 1,2,4")
    return tuple(dict.fromkeys(int(each) for each in text.split(",")))


def run(args: argparse.Namespace) -> None:
    for word in args.others:
        near = nearest_flag(word, OWN, likeness=0.85) if len(word) > 4 and word.startswith("--") else None
        if near is not None:
            raise UserError(nearest_flag_sentence(word, [near]))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from megatron_recursive.evaluation import command

    words = [*args.others, *(["--output_path", args.output] if args.output else [])]
    if args.model is not None and Path(args.model).exists():
        words += ["--model", "recursive", "--model_args", f"pretrained={args.model}"]
    elif args.model is not None:
        words += ["--model", args.model]
    command.run(words, args.depths)
