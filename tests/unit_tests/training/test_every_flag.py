"""Every flag of Megatron's parser is tried, refused or said to be harmless in ``megatron_flags``: a new one is seen."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, WorkerPool, run_distributed
from tests.quick_start import start_quickly
from tests.unit_tests.training import megatron_flags as lists
from tests.unit_tests.training.forked_runs import endings
from tests.unit_tests.training.runs import FLAGS, RECURSION
from tests.unit_tests.training.test_bad_flags import forget, write_dataset

FLAG = re.compile(r"--[a-z0-9][a-z0-9_-]*")
RANKS = 4  # of the runs whose flags are read; none is started
BASE = [*FLAGS, *RECURSION, "--global-batch-size", "16", "--transformer-impl", "local"]
ONE_STEP = [*BASE, "--global-batch-size", "4"]
ONE_STEP[ONE_STEP.index("--train-iters") + 1] = "1"


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


def command_line(line: str, base: list[str] = BASE) -> list[str]:
    """The line behind the base; ``!--flag`` takes one out of it, and a dataset takes the made-up one's place."""
    words, base = line.split(), list(base)
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


def filled(lines: str, place: Path) -> list[str]:
    """The lines with files and folders below ``place``, a folder for each line."""
    data = place / "data"
    write_dataset(data, [40] * 30)
    files = {"blend": str(data), "blends": f'{{"train": ["{data}"], "valid": ["{data}"], "test": ["{data}"]}}',
             "sequences": f'{{"{data}": [30, 31]}}'}  # fmt: skip
    for name, text in files.items():
        (place / name).write_text(text)
    made = []
    for number, line in enumerate(filter(None, lines.split("\n"))):
        folder = place / f"folder-{number}"
        folder.mkdir(exist_ok=True)
        places = {"data": data, "folder": folder, **{name: place / name for name in files}}
        made.append(re.sub(r"\{(\w+)\}", lambda found, places=places: str(places[found[1]]), line))
    return made


def test_refused_flags_are_refused_and_tried_flags_taken(tmp_path: Path) -> None:
    refused, tried = filled(lists.REFUSED, tmp_path), filled(lists.TRIED, tmp_path)
    (said,) = run_distributed(answers, 1, ["", *refused, *tried], timeout=120)
    assert said[0] == "", "the base"
    wrong = []
    for line, sentence in zip([*refused, *tried], said[1:], strict=True):
        flag = line.split()[0]
        if line in tried and sentence or line in refused and not (flag in sentence and sentence.endswith(".")):
            wrong.append(f"{line}: {sentence!r}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def fresh_worker() -> Iterator[WorkerPool]:
    """A worker without earlier jobs: threads of what those leave would be missing in its forks."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.mark.grid
def test_every_flag_trains_or_is_refused_in_a_sentence(tmp_path: Path, fresh_worker: WorkerPool) -> None:
    """One step with each flag that is tried or harmless; those without an effect are many in a run, of the base's loss.

    A flag that exits, hangs or ends in a traceback here belongs to those that are refused.
    """
    (known,) = run_distributed(flags_with_values, 1)
    words = {flag: f"{flag} {lists.VALUES.get(flag, value)}".rstrip() for flag, (_, value, _) in known.items()
             if flag not in lists.WITHOUT_A_STEP.split() and (value is not None or flag in lists.VALUES)}  # fmt: skip
    single = [flag for flags in lists.SINGLE for flag in flags.split() if flag in words]
    others = first_flags(lists.REFUSED) | first_flags(lists.TRIED) | flags_in(lists.TRIED_ELSEWHERE) | {*single}
    families = tuple(prefix for prefixes in lists.FAMILIES for prefix in prefixes.split())
    idle = [flag for flag in words if flag not in others and (known[flag][0] in lists.GROUPS
            or flag.startswith(families)) or flag in single and known[flag][2]]  # fmt: skip
    tried = [line for line in filled(lists.TRIED, tmp_path) if "parallel-size 2" not in line]
    alone = [*tried, *(words[flag] for flag in single if flag not in idle)]

    base, *said = ended(["", *alone], fresh_worker)
    assert base.startswith("loss")
    wrong = [f"{line}: {end}" for line, end in zip(alone, said, strict=True) if not ended_well(end)]
    many = [idle[start::8] for start in range(8)]
    while many:
        rest = []
        ends = ended([" ".join(words[flag] for flag in each) for each in many], fresh_worker)
        for flags, end in zip(many, ends, strict=True):
            named = {flag for flag in flags if flag in flags_in(end)} if refused_well(end) else set()
            if named:  # they are refused as they should be, and the others go on
                rest.append([flag for flag in flags if flag not in named])
            elif end != base and len(flags) > 1:
                rest += [flags[::2], flags[1::2]]
            elif end != base and not refused_well(end):
                wrong.append(f"{words[flags[0]]}: {end}")
        many = [flags for flags in rest if flags]
    assert not wrong, "\n".join(wrong)


def ended(lines: list[str], pool: WorkerPool) -> list[str]:
    (said,) = run_distributed(endings, 1, [command_line(line, ONE_STEP) for line in lines], timeout=600, pool=pool)
    return list(said)


def refused_well(end: str) -> bool:
    return end.startswith("refused: ") and end.endswith(".") and "\n" not in end


def ended_well(end: str) -> bool:
    loss = re.fullmatch(r"loss (.+)", end)
    return math.isfinite(float(loss[1])) if loss else refused_well(end)


def flags_with_values() -> dict[str, tuple[str, str | None, bool]]:
    """The group of each flag; a small value, "" of a switch, None where it needs a word; whether it is the default."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    made: dict[str, tuple[str, str | None, bool]] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            value = None
            if action.nargs == 0:
                value = ""
            elif action.choices:
                last = list(action.choices)[-1]
                value = str(getattr(last, "name", last))
            elif action.type in (int, float):
                positive = action.default if isinstance(action.default, int | float) and action.default > 0 else 1
                value = str(action.type(positive)) if action.nargs is None else "1"
            made |= {flag: (str(group.title), value, value == str(action.default)) for flag in action.option_strings}
    return made
