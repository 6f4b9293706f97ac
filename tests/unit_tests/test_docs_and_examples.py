"""What the documents and examples name exists: paths, flags, commands, quoted code."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_recursive.ablation.config import read_config
from megatron_recursive.commands import parser_of
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.knobs import flag_of
from tests.distributed import run_distributed
from tests.quick_start import start_quickly
from tests.quotes import DOCUMENTS, ROOT, renewed

TEXTS = {name: (ROOT / name).read_text() for name in (*DOCUMENTS, "CHANGELOG.md")}
SCRIPTS = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "examples").rglob("*.sh")}
CONFIGS = [*(ROOT / "examples" / "ablations").glob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml")]
FOLDERS = r"(?:megatron_recursive|examples|tools|benchmarks|tests|requirements|\.ci)"
PATH = re.compile(rf"(?<![\w./-])({FOLDERS}/[\w./-]*\w/?)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+|_[a-z0-9]+)*")
OURS = ("tools/", "benchmarks/")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_quoted_code_is_the_live_code(name: str) -> None:
    assert TEXTS[name] == renewed(name), f"run python -m tests.quotes to renew the quotes of {name}"


@pytest.mark.parametrize("name", [*TEXTS, *SCRIPTS])
def test_every_path_exists(name: str) -> None:
    missing = sorted({path for path in PATH.findall({**TEXTS, **SCRIPTS}[name]) if not (ROOT / path).exists()})
    assert not missing


def _flags_of_pretraining() -> set[str]:
    """All flags of the pretraining command (in a worker: Megatron is imported there)."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_recursive.training.arguments import _add_arguments

    parser = _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {option for action in parser._actions for option in action.option_strings}


def test_every_flag_exists() -> None:
    (known,) = run_distributed(_flags_of_pretraining, 1)
    sources = [path for folder in ("tools", "benchmarks", "megatron_recursive/commands", "megatron_recursive/data")
               for path in (ROOT / folder).glob("*.py")]  # fmt: skip
    for source in sources:
        known |= set(FLAG.findall(source.read_text()))
    known |= {"--help", "--standalone", "--nproc_per_node", "--upgrade", "--logdir", "--no-build-isolation"}
    known |= {"--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}  # torchrun reads them in test_examples.py
    known |= {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time",
              "--requeue"}  # sbatch
    known |= {"--trust-remote-code", "--continuous-batching", "--use_cache"}  # transformers serve, lm-eval
    for name, text in {**TEXTS, **SCRIPTS}.items():
        unknown = {flag for flag in FLAG.findall(text) if flag not in known}
        assert not unknown, f"{name} names {sorted(unknown)}"


def _parse(commands: list[str]) -> int:
    """Parse the flags of pretraining commands (in a worker); raises what the command would say."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_recursive.training.arguments import _add_arguments

    start_quickly()
    for command in commands:
        parser = _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
        parser.parse_args(shlex.split(command))
    return len(commands)


def _command_lines() -> list[tuple[str, list[str]]]:
    """(name, words) of every line of the documents that calls the console script; lines with "..." are left out."""
    found = []
    for text in TEXTS.values():
        joined = text.replace("\\\n", " ")
        for name, words in re.findall(r"^(?: {4})?[\w./-]*megatron-recursive ([a-z-]+)\b(.*)$", joined, re.MULTILINE):
            if "..." not in words:
                found.append((name, shlex.split(words, comments=True)))
    return found


def test_every_command_parses() -> None:
    for name, words in _command_lines():
        if "--help" not in words:
            parser_of(name).parse_known_args(words)


def test_every_pretraining_command_parses() -> None:
    commands = [shlex.join(parser_of("pretrain").parse_known_args(words)[1])
                for name, words in _command_lines() if name == "pretrain" and "--help" not in words]  # fmt: skip
    for text in TEXTS.values():
        joined = text.replace("\\\n", " ")
        script = r"^\S.*(?:pretrain_recursive_gpt\.py|-m megatron_recursive\.pretrain) +(--.*)$"
        commands += re.findall(script, joined, re.MULTILINE)
    script = SCRIPTS["examples/recursive_gpt/pretrain_default.sh"]
    block = re.search(r" pretrain [^\n]*\n(  --.*?)\n\)", script, re.DOTALL)
    assert block is not None
    text = re.sub(r"\$\(\(.*?\)\)", "8", block[1].replace("\n", " ").replace('"$@"', ""))
    commands.append(re.sub(r'"\$\w+"', "2", text))
    for file in CONFIGS:
        commands += [shlex.join(arm.flags) for arm in read_config(file).arms]
    commands = [command for command in commands if "..." not in command]
    assert run_distributed(_parse, 1, commands) == [len(commands)] and len(commands) >= 2


def test_the_guide_has_every_recursion_flag() -> None:
    for knob in dataclasses.fields(RecursionConfig):
        assert f"`{flag_of(knob.name)}`" in TEXTS["RECURSIVE_GPT_IMPLEMENTATION_GUIDE.md"]


@pytest.mark.parametrize("tool", sorted(str(p.relative_to(ROOT)) for f in OURS for p in (ROOT / f).glob("*.py")))
def test_every_tool_says_what_it_does(tool: str) -> None:
    result = subprocess.run([sys.executable, str(ROOT / tool), "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "usage:" in result.stdout


def test_every_command_of_make_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, text in TEXTS.items():
        commands = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
        assert set(commands) <= targets, f"{name} names a target that the Makefile lacks"


def test_entry_points_are_shells() -> None:
    for folder, limit in (("examples/recursive_gpt", 40), ("tools", 80)):
        for script in Path(ROOT / folder).glob("*.py"):
            assert len(script.read_text().splitlines()) < limit, script
