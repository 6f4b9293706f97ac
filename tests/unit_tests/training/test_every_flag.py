"""Every flag of Megatron's parser is tried, refused or said to be harmless in ``megatron_flags``: a new one is seen."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from tests.distributed import REPOSITORY, run_distributed
from tests.quick_start import start_quickly
from tests.unit_tests.training import megatron_flags as lists
from tests.unit_tests.training.runs import FLAGS, RECURSION
from tests.unit_tests.training.test_bad_flags import forget, write_dataset

FLAG = re.compile(r"--[a-z0-9][a-z0-9_-]*")
RANKS = 4  # of the runs whose flags are read; none is started
BASE = [*FLAGS, *RECURSION, "--global-batch-size", "16", "--transformer-impl", "local"]


def groups_of_the_parser() -> list[tuple[str, list[list[str]]]]:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return [(str(group.title), [action.option_strings for action in group._group_actions if action.option_strings])
            for group in parser._action_groups]  # fmt: skip


def flags_in(text: str) -> set[str]:
    return set(FLAG.findall(text))


def first_flags(lines: str) -> set[str]:
    return {line.split()[0] for line in lines.split("\n") if line}


def test_no_flag_of_megatron_is_new() -> None:
    """Each is in one list: a new release cannot add one, or move one to a group of which nothing is read."""
    (groups,) = run_distributed(groups_of_the_parser, 1)
    refused, tried = first_flags(lists.REFUSED), first_flags(lists.TRIED) | flags_in(lists.TRIED_ELSEWHERE)
    single = {flag for flags in lists.SINGLE for flag in flags.split()}
    families = tuple(prefix for prefixes in lists.FAMILIES for prefix in prefixes.split())
    actions = [(title, names) for title, flags in groups for names in flags]
    unseen = [(title, names[0]) for title, names in actions
              if title not in lists.GROUPS and not {*names} & (tried | refused | single)
              and not any(name.startswith(families) for name in names)]  # fmt: skip
    assert not unseen, "try them in a test, refuse them, or say why they are harmless"
    assert len(actions) == lists.ALL
    known = {name for _, names in actions for name in names}
    assert not (single | refused | tried) - known and not lists.GROUPS.keys() - {title for title, _ in groups}, "gone"
    assert not [prefix for prefix in families if not any(name.startswith(prefix) for name in known)], "gone"
    assert not (tried & refused) | (tried & single) | (refused & single), "one list each"


def test_what_others_rest_on_is_refused() -> None:
    reasons = [reason for table in (lists.GROUPS, lists.FAMILIES) for reason in table.values() if "refused" in reason]
    named = {flag for reason in reasons for flag in flags_in(reason)}
    assert named and not named - first_flags(lists.REFUSED)


def test_every_tried_flag_is_trained_with() -> None:
    files = [*(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.sh")]
    lists_of_flags = ("megatron_flags", "test_every_flag")
    texts = [file.read_text(encoding="utf-8") for file in files if file.stem not in lists_of_flags]
    missing = (first_flags(lists.TRIED) | flags_in(lists.TRIED_ELSEWHERE)) - flags_in("\n".join(texts))
    assert not missing, "move them to those that are harmless, or train with them"


def command_line(line: str) -> list[str]:
    """The line behind the base; ``!--flag`` takes one out of it, and a dataset takes the made-up one's place."""
    words, base = line.split(), list(BASE)
    without = [word.removeprefix("!") for word in words if word.startswith("!")]
    for flag in without:
        place = base.index(flag)
        del base[place : place + 2]
    if any("data" in word and "-path" in word and "cache" not in word for word in words):
        base.remove("--mock-data")
    return [*base, *(word for word in words if not word.startswith("!"))]


def answers(lines: list[str]) -> list[str]:
    """The sentence that refuses each, or "". Read as rank 0 of a run would, up to the model's config."""
    from megatron_recursive.errors import UserError
    from megatron_recursive.training.arguments import megatron_speaks_in_sentences, parse_arguments
    from megatron_recursive.training.model_provider import model_config_from_args

    said, before = [], dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "RANK": "0", "LOCAL_RANK": "0"}
    start_quickly()
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all 800 arguments
        for line in lines:
            sys.argv = ["pretrain", *command_line(line)]
            try:
                args, recursion = parse_arguments()
                with megatron_speaks_in_sentences(args):
                    model_config_from_args(args, recursion)
                said.append("")
            except UserError as error:
                said.append(str(error))
            except (Exception, SystemExit) as error:  # a flag that is refused otherwise
                said.append(f"{type(error).__name__}: {error}")
            forget()
    os.environ.clear()
    os.environ |= before
    return said


def test_refused_flags_are_refused_and_tried_flags_taken(tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "folder"
    folder.mkdir()
    write_dataset(data, [40] * 30)
    files = {"blend": str(data), "blends": f'{{"train": ["{data}"], "valid": ["{data}"], "test": ["{data}"]}}',
             "sequences": f'{{"{data}": 30}}'}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = {"{data}": data, "{folder}": folder, **{f"{{{name}}}": tmp_path / name for name in files}}

    def filled(lines: str) -> list[str]:
        return [re.sub(r"\{\w+\}", lambda found: str(places[found[0]]), line) for line in lines.split("\n") if line]

    refused, tried = filled(lists.REFUSED), filled(lists.TRIED)
    (said,) = run_distributed(answers, 1, ["", *refused, *tried], timeout=120)
    assert said[0] == "", "the base"
    wrong = []
    for line, sentence in zip([*refused, *tried], said[1:], strict=True):
        flag = line.split()[0]
        if line in tried and sentence or line in refused and not (flag in sentence and sentence.endswith(".")):
            wrong.append(f"{line}: {sentence!r}")
    assert not wrong, "\n".join(wrong)
