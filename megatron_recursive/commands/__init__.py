"""The console script ``megatron-recursive``: a module of this folder for each of its commands.

Such a module has ``SUMMARY`` (a line), ``add_arguments(parser)`` and ``run(args)``. It imports nothing heavy outside
``run``: ``--help`` answers at once, and without the packages that the work needs. ``add_passed_on(parser)`` in a module
says that flags which its parser does not know are somebody else's, and adds those that its help shows; ``run`` finds
what was given in ``args.others``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_recursive import __version__
from megatron_recursive.command_line import PROGRAM, CommandParser, is_known_package, missing_package
from megatron_recursive.errors import UserError, report_user_errors

COMMANDS = ("pretrain", "corpus", "tokenizer", "preprocess", "convert", "generate", "plan", "plot", "summarize",
            "ablate", "mix", "phi", "task", "evaluate", "count", "layers", "sweep", "health", "report", "prepare-chat",
            "chat-metrics")  # fmt: skip
_INTERRUPTED = 130  # as shells report SIGINT


def module_of(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def parser_of(name: str) -> CommandParser:
    """The parser of a command."""
    module = module_of(name)
    passes_on = getattr(module, "add_passed_on", None)
    parser = CommandParser(passes_on, prog=f"{PROGRAM} {name}", description=module.SUMMARY)
    module.add_arguments(parser)
    return parser


def overview() -> str:
    """What ``megatron-recursive --help`` prints."""
    lines = [f"  {name:<13}{module_of(name).SUMMARY}" for name in COMMANDS]
    return "\n".join([
        f"usage: {PROGRAM} COMMAND [options]", "", "Recursive (looped-depth) language models on Megatron-Core.", "",
        "commands:", *lines, "", f"{PROGRAM} COMMAND --help tells a command's options; --version tells {__version__}.",
    ])  # fmt: skip


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the words name. A user's mistake ends in one sentence on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        _run(name, rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        which = f"the nearest is {near[0]}" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"There is no command {name}; {which}.")


def _run(name: str, words: Sequence[str]) -> None:
    parser = parser_of(name)
    args, others = parser.parse_known_args(words)
    if hasattr(module_of(name), "add_passed_on"):
        args.others = others
    elif others:  # words, since the parser refuses flags that it does not know
        raise UserError(f"{others[0]} belongs to no flag; --help lists what {parser.prog} takes.")
    try:
        with _quiet_libraries() if name != "pretrain" else contextlib.nullcontext():  # it keeps a log
            module_of(name).run(args)
    except ModuleNotFoundError as error:
        if not is_known_package(error.name or ""):
            raise
        raise missing_package(error.name or "") from error
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Megatron, torch and transformers tell of every package that they do not find, and of every choice they make."""
    loggers = [logging.getLogger(name) for name in ("", "megatron", "torch.utils.cpp_extension", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def door(*words: str) -> None:
    """What a file in ``tools/`` does: the command that the words name, with those that follow the file's."""
    main([*words, *sys.argv[1:]])
