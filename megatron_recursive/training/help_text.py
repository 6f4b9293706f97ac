"""What the training program says of its flags, and of those that it does not know."""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from megatron_recursive.command_line import PRETRAIN_EXAMPLE, PROGRAM, HelpFormatter, example, nearest_flag_sentence
from megatron_recursive.errors import UserError
from megatron_recursive.training import console

USAGE = (
    "%(prog)s --num-layers N --hidden-size N --num-attention-heads N --seq-length N --micro-batch-size N "
    "--train-iters N --lr X --data-path PREFIX --tokenizer-type TYPE --tokenizer-model DIR [options]"
)
DESCRIPTION = (
    "Pretrain a recursive GPT. Megatron-Core's own flags follow those of recursive runs. @FILE stands for the flags in "
    "a file, one a line. A later flag wins."
)
_ALL = f"{PROGRAM} pretrain --help-all"  # --help of that command, unlike this program's, has the recursion's alone


def describe(parser: argparse.ArgumentParser, upstream: Sequence[object]) -> argparse.ArgumentParser:
    """Put all groups of flags but those of ``upstream`` first in the help, and let mistakes end in one sentence.

    The formatter also mends Megatron's help texts in which a bare ``%`` stands.
    """
    parser._action_groups.sort(key=lambda group: group in upstream)
    parser.formatter_class, parser.prog = HelpFormatter, f"{PROGRAM} pretrain"
    parser.usage, parser.description, parser.epilog = USAGE, DESCRIPTION, example("pretrain", *PRETRAIN_EXAMPLE)
    parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]
    parser.print_help = functools.partial(_print_help, parser)  # type: ignore[method-assign]
    return parser


def _print_help(parser: argparse.ArgumentParser, file: object = None) -> None:
    """Past the log, into which the standard streams go in a training process; one rank is enough."""
    if os.environ.get("RANK", "0") == "0":
        console.say(parser.format_help().rstrip("\n"))


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    unknown = re.match(r"unrecognized arguments:.*? (--\S+)", message)
    if unknown is not None:
        raise UserError(nearest_flag_sentence(unknown[1], parser._option_string_actions, _ALL))
    message = message.removeprefix("argument ")
    raise UserError(f"{message[:1].upper()}{message[1:]} ({_ALL} lists every flag).")
