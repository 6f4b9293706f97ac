"""What all public commands share: their parser, the nearest flag for a mistyped one, and lines that work as printed.

Standard library only: ``--help`` must not wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_recursive.errors import UserError

PROGRAM = "megatron-recursive"
PRETRAIN_EXAMPLE = (
    "--nproc-per-node 2 --pipeline-model-parallel-size 2 --num-layers 2 --hidden-size 64 --num-attention-heads 2 "
    "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8 --train-iters 10 "
    "--lr 1e-3 --log-interval 1 --eval-iters 1 --mock-data --split 90,5,5 "
    "--tokenizer-type NullTokenizer --vocab-size 127"
).split()
_NUMBER = re.compile(r"-\.?\d")
_EXAMPLE_WIDTH = 100
_LONG = 32  # of what stands beside a flag in --help

# Package -> the extra of setup.py that brings it; the others of this list come with the base installation.
_EXTRA_OF = {
    "datatrove": "data", "orjson": "data", "pyarrow": "data", "sentencepiece": "data", "zstandard": "data",
    "gguf": "hf", "accelerate": "hf", "matplotlib": "plots", "wandb": "plots", "lm_eval": "eval", "kneed": "analysis",
    "sacrebleu": "chat",
    **dict.fromkeys(("megatron", "numpy", "safetensors", "tensorboard", "tokenizers", "torch", "tqdm",
                    "transformers", "yaml"), ""),
}  # fmt: skip


def is_known_package(name: str) -> bool:
    return name.partition(".")[0] in _EXTRA_OF


def missing_package(name: str) -> UserError:
    """What to say where a package of ours cannot be imported, with the line that installs it."""
    package = name.partition(".")[0]
    extra = _EXTRA_OF.get(package)
    wanted = f"'{PROGRAM}[{extra}]'" if extra else PROGRAM if extra == "" else package
    return UserError(f"The package {package} is not installed; install it with pip install {wanted}.")


def nearest_flag(word: str, known: Iterable[str], likeness: float = 0.7) -> str | None:
    """The flag that a mistyped or shortened one is probably meant to be, or None."""
    asked = word.split("=", 1)[0].replace("_", "-").lower()
    spelled = {name.replace("_", "-"): name for name in known if name.startswith("--")}
    longer = sorted((name for name in spelled if name.startswith(asked)), key=len)
    near = longer or difflib.get_close_matches(asked, spelled, n=1, cutoff=likeness)
    return spelled[near[0]] if near else None


def nearest_flag_sentence(unknown: str, known: Iterable[str], told_by: str = "--help") -> str:
    """What to say about a flag that no parser knows, given those that it does know."""
    near = nearest_flag(unknown, known)
    rest = f"the nearest is {near} ({told_by} lists all)" if near else f"{told_by} lists all"
    return f"There is no flag {unknown.split('=', 1)[0]}; {rest}."


def command(*words: str) -> str:
    """The line that runs ``megatron-recursive WORDS`` in the shell of the reader, from the folder that this runs in.

    The console script by name where the shell's PATH has it, or else by path (a ``.venv`` that nobody activated), or
    else, without a console script, ``python -m megatron_recursive``.
    """
    folder = Path(sys.executable).parent
    script = folder / PROGRAM
    on_path = shutil.which(PROGRAM)
    if on_path is not None and (not script.exists() or os.path.samefile(on_path, script)):
        start = [PROGRAM]
    elif script.exists():
        start = [_shortest(script)]
    else:
        python = shutil.which("python")
        found = python is not None and os.path.samefile(Path(python).parent, folder)
        start = ["python" if found else _shortest(Path(sys.executable)), "-m", "megatron_recursive"]
    return shlex.join([*start, *words])


def _shortest(path: Path) -> str:
    """Relative to the current folder if below it; with a slash in any case, without which a shell searches PATH."""
    here = Path.cwd()
    if not path.is_relative_to(here):
        return str(path)
    below = str(path.relative_to(here))
    return below if "/" in below else f"./{below}"


def example(*words: str) -> str:
    """The end of a command's ``--help`` (its parser's epilog): one line to type, continued where it is long."""
    lines, line = [], ""
    for part in re.split(r" (?=-)", command(*words)):
        if line and len(line) + len(part) > _EXAMPLE_WIDTH:
            lines.append(line + " \\")
            line = "   "
        line = f"{line} {part}" if line else part
    return "\n  ".join(["example:", *lines, line])


def _choices(action: argparse.Action) -> str:
    """Many are told behind the help, and not beside the flag."""
    choices = [*(action.choices or ())]
    if action.metavar is not None or not action.option_strings or len(",".join(map(str, choices))) <= _LONG:
        return ""
    return f" (one of {', '.join(str(getattr(choice, 'name', choice)) for choice in choices)})"  # of an Enum its name


class HelpFormatter(argparse.HelpFormatter):
    """Required arguments first in the usage, defaults told, examples as written, and no traceback at a stray ``%``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size((100, 24)).columns - 2, 110))

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        if usage is None:
            words = [self._prog]
            for action in actions:
                if action.required:
                    values = self._format_args(action, self._get_default_metavar_for_optional(action))
                    words.append("\xa0".join([*action.option_strings[:1], *([values] if values else [])]))
            usage = " ".join([*words, "[options]"]).replace("%", "%%")
        lines = textwrap.wrap(usage, self._width - len("usage: "), break_on_hyphens=False)
        super().add_usage("\n       ".join(lines).replace("\xa0", " "), actions, groups, prefix)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        for kind, name in ((int, "N"), (float, "X")):
            if action.type is kind:
                return name
        name = action.dest.upper()
        return name if len(name) <= _LONG else name.rpartition("_")[2]

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if _choices(action):
            return lambda size: ("WORD",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action) + _choices(action)
        except (ValueError, TypeError, KeyError):  # Megatron-Core 0.19.2 has help texts with a bare "%"
            return " ".join((action.help or "").replace("%%", "%").split()) + _choices(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        is_switch = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        told = not action.option_strings or action.required or is_switch or "default" in text.lower()
        if told or default in (None, argparse.SUPPRESS, [], ()):
            return text
        if isinstance(default, bool):
            return f"{text} (default: {'on' if default else 'off'})"
        return f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """argparse with one answer to a mistake: one sentence (:class:`UserError`, so exit code 2), no usage before it.

    A mistyped flag is told the nearest one, and before anything else is found missing; abbreviations are mistyped
    flags. Give the flags in groups (``parser.add_argument_group("required")`` first): what is in none, ``--help`` at
    least, is listed last. ``parser.epilog = example("plot", ...)`` closes the help. With ``passes_on``, flags that it
    does not know are for somebody else, and :meth:`parse_known_args` returns them; ``passes_on(parser)`` adds those of
    them that the help should show.
    """

    def __init__(self, passes_on: Callable[[argparse.ArgumentParser], None] | None = None, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **settings})
        self._optionals.title = "other options"
        self._passes_on, self._shows_passed_on = passes_on, False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # subparsers are called by this name
        words = sys.argv[1:] if args is None else list(args)
        if self._passes_on is None:
            self._refuse_unknown(words)
        return super().parse_known_args(words, namespace)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows a subcommand is for its own parser to know
            is_flag = word.startswith("-") and len(word) > 1 and " " not in word and not _NUMBER.match(word)
            if is_flag and word.split("=", 1)[0] not in self._option_string_actions:
                raise UserError(nearest_flag_sentence(word, self._option_string_actions))

    def format_help(self) -> str:
        if self._passes_on is not None and not self._shows_passed_on:
            self._shows_passed_on = True
            self._passes_on(self)
        self._action_groups.sort(key=lambda group: group is self._optionals)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing is not None:
            names = missing[1].split(", ")
            message = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        message = message.removeprefix("argument ")
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help lists what {self.prog} takes.")
