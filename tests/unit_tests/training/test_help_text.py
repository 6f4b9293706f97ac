"""--help of the training program, and its answer to flags that do not exist."""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout

from megatron_recursive.command_line import nearest_flag
from megatron_recursive.commands.pretrain import LAUNCHER_FLAGS, LIKENESS
from tests.distributed import run_distributed
from tests.unit_tests.training.runs import FLAGS, train


def _facts() -> tuple[str, str, list[str]]:
    """The help as the program prints it, an upstream help text that argparse cannot format, and all flags."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_recursive.training.arguments import _add_arguments

    upstream = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    broken = ""
    try:
        upstream.format_help()
    except (ValueError, TypeError) as error:
        broken = repr(error)
    parser = _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    with redirect_stdout(io.StringIO()) as heard:
        parser.print_help()
    return heard.getvalue(), broken, list(parser._option_string_actions)


def test_help_of_all_flags() -> None:
    ((text, broken, flags),) = run_distributed(_facts, 1)
    assert broken, "Megatron's help formats again: HelpFormatter._expand_help may go"
    assert text.startswith("usage: megatron-recursive pretrain --num-layers N --hidden-size N")
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    ours = ["recursion:", "norms of the layers:", "samples during training:", "low-rank adapters (LoRA):",
            "recursive runs:"]
    assert titles[:1] == ours[:1] and set(ours) <= set(titles[: titles.index("options:")])
    assert max(map(len, text.splitlines())) <= 120 and "--attention-backend WORD" in text and "flash, fused, " in text
    assert "%%" not in text and "\nexample:\n" in text and all(f" {flag}" in text for flag in ("--lr", "--bf16"))

    taken = {flag: near for flag in flags if len(flag) > 4 and (near := nearest_flag(flag, LAUNCHER_FLAGS, LIKENESS))}
    assert not taken, "the launcher would refuse a training flag"
    assert not set(flags) & set(LAUNCHER_FLAGS)


def test_a_mistyped_training_flag_is_answered_with_the_nearest() -> None:
    flags = [*FLAGS, "--num-refinment-blocks", "3"]
    assert train(flags=flags) == (
        "There is no flag --num-refinment-blocks; the nearest is --num-refinement-blocks "
        "(megatron-recursive pretrain --help-all lists all)."
    )
    assert "--num-layers" in str(train("--num-layer=3"))
