"""``megatron-recursive pretrain``."""

from __future__ import annotations

import argparse
import re

from megatron_recursive.command_line import PRETRAIN_EXAMPLE, example, nearest_flag, nearest_flag_sentence
from megatron_recursive.errors import UserError
from megatron_recursive.plan.recursion_config import add_recursion_arguments

SUMMARY = "Pretrain a recursive GPT, in one process or several."

# Flag -> what its value must look like, and its help.
LAUNCHER_FLAGS = {
    "--nproc-per-node": (r"[1-9]\d*|gpu", "processes on this node; gpu: one a CUDA device (default: 1)"),
    "--nnodes": (r"[1-9]\d*(:[1-9]\d*)?", "nodes, or MIN:MAX (default: 1)"),
    "--node-rank": (r"\d+", "number of this node, where nodes meet at --master-addr (default: 0)"),
    "--master-addr": (r"\S+", "host of node 0 (default: 127.0.0.1)"),
    "--master-port": (r"\d+", "port of node 0 (default: 29500, or a free one for one node)"),
    "--rdzv-backend": ("c10d|static", "c10d: at --rdzv-endpoint; static: at --master-addr (default: static)"),
    "--rdzv-endpoint": (r"\S+", "HOST:PORT where nodes meet"),
    "--rdzv-id": (r"\S+", "name of the job, the same on all nodes"),
    "--rdzv-conf": (r"\S+", "further settings of the meeting, NAME=VALUE,..."),
    "--max-restarts": (r"\d+", "times that failed ranks are started again (default: 0)"),
}

LIKENESS = 0.85  # to one of these, at which a training flag is taken for a mistyped launcher's: none of Megatron's is


def add_passed_on(parser: argparse.ArgumentParser) -> None:
    add_recursion_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [launcher options] TRAINING FLAGS"
    parser.description = (
        "Pretrain a recursive GPT. Every flag of Megatron's GPT pretraining applies; those of the recursion stand "
        "below. --help-all lists all: Megatron's, and this package's own of norms, samples, optimizers, distillation, "
        "conversations, streams, LoRA and runs. Without launcher options one process trains."
    )
    launcher = parser.add_argument_group("launcher, as torchrun has it")
    for flag, (pattern, text) in LAUNCHER_FLAGS.items():
        _add(launcher, flag, pattern, text)
    other = parser.add_argument_group("help")
    other.add_argument("--help-all", action="store_true", help="every flag of training, Megatron's among them (slow)")
    parser.epilog = example("pretrain", *PRETRAIN_EXAMPLE)


def _add(group: argparse._ArgumentGroup, flag: str, pattern: str, help: str) -> None:
    """A flag that torchrun has, in both of its spellings; the value stays text."""

    def checked(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise argparse.ArgumentTypeError(f"'{text}' does not fit")
        return text

    group.add_argument(flag, metavar="N" if "\\d" in pattern else "TEXT", type=checked, help=help)
    if "-" in flag[2:]:
        group.add_argument(f"--{flag[2:].replace('-', '_')}", type=checked, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    from megatron_recursive.launch import launch

    options = {name: value for name, value in vars(args).items() if value and name not in ("help_all", "others")}
    for word in args.others:
        near = nearest_flag(word, LAUNCHER_FLAGS, LIKENESS) if len(word) > 4 and word.startswith("--") else None
        if near is not None:  # training would say so a quarter of a minute later
            raise UserError(nearest_flag_sentence(word, [near]))
    raise SystemExit(launch(["--help"]) if args.help_all else launch(args.others, options))
