"""The console script: what --help says at every command, mistyped words, start-up, printed lines, and the launcher."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_recursive import commands, launch
from megatron_recursive.command_line import CommandParser, HelpFormatter, command, nearest_flag_sentence
from megatron_recursive.commands import COMMANDS, corpus, main, parser_of
from megatron_recursive.commands.pretrain import LAUNCHER_FLAGS
from tests.distributed import REPOSITORY
from tests.grids import grid

EVERY = [*((name,) for name in COMMANDS), *(("convert", action) for action in ("import", "export", "verify")),
         *(("task", action) for action in ("hops", "addition", "evaluate"))]  # fmt: skip
HEAVY = ("torch", "numpy", "transformers", "megatron", "matplotlib", "pyarrow", "datatrove")


def parser_at(words: tuple[str, ...]) -> CommandParser:
    parser = parser_of(words[0])
    for word in words[1:]:
        parser = subparsers_of(parser)[word]
    return parser


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, CommandParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the console script."""
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = said(capsys, *words, "--help")
    assert (code, err) == (0, "") and "%%" not in text and "%(" not in text
    usage, *blocks, last = re.split(r"\n\n(?=\S)", text)
    assert usage.startswith(f"usage: megatron-recursive {' '.join(words)} ")
    parser = parser_at(words)
    for action in parser._actions:
        name = (action.option_strings or [str(action.metavar)])[-1]
        assert (name in usage.split("[options]")[0]) == action.required or "pretrain" in words, name
        assert action.help or not action.option_strings, name
        if action.option_strings and action.default not in (None, argparse.SUPPRESS, []) and action.nargs != 0:
            told = re.search(rf"  {action.option_strings[0]}\b[^\n]*(\n {{20}}[^\n]*)*default", text)
            assert told or action.required, name
    assert "--help" in blocks[-1], "its own options come first"
    assert last.startswith("example:\n  " + command(*words)), last
    assert max(map(len, text.splitlines())) <= 120


def test_help_shows_no_knob_that_the_command_does_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {action.dest for action in parser_at(("convert", "import"))._actions}
    assert {"state_norm", "halt_loss_weight"} < flags
    assert not flags & {"halt_threshold", "recursion_alarm_after", "halt_target"}
    text = said(capsys, "pretrain", "--help")[1]
    assert "--halt-threshold" in text and "--nproc-per-node" in text and "--nproc_per_node" not in text


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ((), ("--help",)):
        code, text, _ = said(capsys, *argv)
        assert code == 0 and all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)
    assert said(capsys, "--version")[1].strip() == commands.__version__
    assert "the nearest is preprocess" in said(capsys, "preproces")[2]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_a_mistyped_flag_is_answered_with_the_nearest(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    known = [flag for flag in parser_at(words)._option_string_actions if flag.startswith("--") and "_" not in flag]
    flag = max(known, key=len)
    for typed in (flag[:5] + flag[6:], f"{flag[:-2]}=3", flag[:-3]):  # a letter left out, or an abbreviation
        code, out, err = said(capsys, *words, typed, "3")
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert err.startswith(f"error: There is no flag {typed.split('=')[0]}; the nearest is --"), err
        assert f" {flag}" in err or flag.startswith(err.split("nearest is ")[1].split()[0][:6])


def test_other_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "tokenizer --vocab-size x": "--vocab-size: invalid int value: 'x'",
        "tokenizer --input a": "--output and --vocab-size are missing",
        "corpus --output a b": "b belongs to no flag",
        "convert imprt": "invalid choice: 'imprt'",
        "convert export --ckpt a": "--out is missing",
        "pretrain --nproc-per-node 0": "--nproc-per-node: '0' does not fit",
        "pretrain --nnodes 3:2": "do not fit: min_nodes must be",
        "pretrain --nnodes 2 --rdzv-endpoint host:x": "do not fit: The port number",
        "pretrain --nproc 2 --num-layers 2": "the nearest is --nproc-per-node",
    }
    for line, sentence in wrong.items():
        code, out, err = said(capsys, *line.split())
        assert (code, out, err.count("\n")) == (2, "", 1) and sentence in err, err
    assert nearest_flag_sentence("--lr_x=3", ["--lr", "--zzz"]).startswith("There is no flag --lr_x")
    assert nearest_flag_sentence("--num_layers", ["--num-layers", "--x"]).startswith(
        "There is no flag --num_layers; the nearest is --num-layers"
    )
    assert "nearest" not in nearest_flag_sentence("--quux", ["--num-layers"])


def test_a_missing_package_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    preprocess = ["preprocess", "--input", f"{tmp_path}/a.jsonl", "--output", f"{tmp_path}/a", "--tokenizer", "gpt2"]
    lines = {
        "datatrove": (preprocess, "'megatron-recursive[data]'"),
        "torch": (["convert", "verify", "a", "b"], "megatron-recursive"),
        "megatron": (["pretrain", "--num-layers", "2"], "megatron-recursive"),
    }
    for package, (argv, wanted) in lines.items():
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            code, _, err = said(capsys, *argv)
        said_so = f"error: The package {package} is not installed; install it with pip install {wanted}.\n"
        assert (code, err) == (2, said_so)


def test_ctrl_c_leaves_no_stack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "run", interrupted)
    assert said(capsys, "corpus", "--output", "data") == (130, "", "")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "megatron_recursive", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert (command.stderr.read(), command.wait(60)) == (b"", 141)


def test_help_texts_with_a_bare_percent_sign_are_shown_as_they_are() -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--share", type=float, default=1.1, help="headroom (1.10 = 10%) of %(default)s")
    assert "headroom (1.10 = 10%) of" in parser.format_help()


def test_help_starts_without_heavy_packages() -> None:
    """One process: all parsers are made, and the longest help is printed, within a second of CPU time."""
    program = (
        "import json, resource, sys\n"
        "from megatron_recursive.commands import COMMANDS, main, parser_of\n"
        "for name in COMMANDS: parser_of(name).format_help()\n"
        "main([])\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([heavy, used.ru_utime + used.ru_stime]))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    heavy, seconds = json.loads(result.stdout.splitlines()[-1])
    assert heavy == [] and seconds < 1.0, result.stdout[-500:]


# --- printed lines --------------------------------------------------------------------------------------------------


def test_the_command_is_named_as_the_reader_s_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, other = tmp_path / "clone" / ".venv" / "bin", tmp_path / "other"
    for folder in (programs, other):
        folder.mkdir(parents=True)
        for name in ("python", "megatron-recursive"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "clone")
    assert command("plot", "a b") == ".venv/bin/megatron-recursive plot 'a b'"
    monkeypatch.chdir(programs)
    assert command() == "./megatron-recursive"
    monkeypatch.chdir(tmp_path / "other")
    assert command("plot") == f"{programs}/megatron-recursive plot"
    monkeypatch.setenv("PATH", f"{other}:/usr/bin:/bin")
    assert command("plot") == f"{programs}/megatron-recursive plot", "not another environment's"
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    assert command("plot") == "megatron-recursive plot"
    (programs / "megatron-recursive").unlink()
    assert command("plot") == "python -m megatron_recursive plot"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "clone")
    assert command("plot") == ".venv/bin/python -m megatron_recursive plot"


def in_bare_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], **kept}
    shell = ["bash", "-c", line]
    return subprocess.run(shell, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def example_of(name: str) -> str:
    epilog = parser_of(name).epilog
    assert epilog is not None
    return epilog.removeprefix("example:\n")


@pytest.mark.grid
def test_printed_lines_run_in_a_bare_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the clone's folder, and the examples of --help: the second reads what the first wrote."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    result = in_bare_shell(command("--version"), REPOSITORY)
    assert result.stdout.strip() == commands.__version__, result.stderr
    monkeypatch.chdir(tmp_path)
    for name, written in (("corpus", "data/train.jsonl"), ("tokenizer", "tokenizer")):
        result = in_bare_shell(example_of(name), tmp_path)
        assert result.returncode == 0 and (tmp_path / written).exists(), result.stderr


# --- the launcher ---------------------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("error: rank 1 of", os.environ["WORLD_SIZE"], *sys.argv[1:], file=sys.stderr, flush=True)
    {end}
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program that the launcher starts instead of the training program."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(launch, "PROGRAM", "rank_program")
    yield tmp_path / "rank_program.py"


@pytest.mark.parametrize(("end", "code"), grid([("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
                                               quick=[("sys.exit(2)", 2)]))
def test_the_launcher_ends_with_the_rank_s_own_words_and_code(
    program: Path, end: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text(RANK.format(end=end))
    assert launch.launch(["--lr", "3"], {"nproc_per_node": "2"}) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: rank 1 of 2 --lr 3\n")
    assert err.count("\n") == 1 + (code > 128)  # a rank that a signal ended did not say so


def test_launcher_options_are_torchrun_s() -> None:
    from torch.distributed.run import get_args_parser

    known = get_args_parser()._option_string_actions
    assert set(LAUNCHER_FLAGS) <= set(known)
