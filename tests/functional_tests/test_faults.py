"""A seeded campaign of faults: 8 SIGKILLs, full disks, damaged and foreign checkpoints.

After a kill the same command must go on as if nothing had happened: every metric of every iteration and the last
weights equal those of an undisturbed run, the bytes of a data set too. Any other fault ends in one sentence and leaves
the last good checkpoint usable.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed import REPOSITORY, processes_with, run_command
from tests.forked_runs import ForkedRun, RunServer, wait_until
from tests.unit_tests.training.runs import (
    FLAGS,
    RECURSION,
    SCRIPT,
    TIMES,
    copy_checkpoint,
    files_of,
    metrics_of,
    records_of,
    save_to,
    tensors_of,
)

pytestmark = pytest.mark.heavy  # about a minute and a half on two idle cores

TRACKER = "latest_checkpointed_iteration.txt"
PREPROCESS = REPOSITORY / "tools" / "preprocess_data.py"
LENGTH = 60  # iterations of a killed run
MANY = ["--train-iters", str(LENGTH), "--lr-decay-iters", str(LENGTH)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunServer]:
    server = RunServer(tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


def command(folder: Path, *flags: str, every: int) -> list[str]:
    return [*FLAGS, *RECURSION, *MANY, *flags, *save_to(folder, every=every)]


def run_to_the_end(server: RunServer, argv: list[str], world_size: int = 1) -> None:
    run = server.start(argv, world_size)
    assert run.wait() == [0] * world_size, run.tail()


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def named_iteration(folder: Path) -> int:
    """The iteration that a resumed run will go on from. An empty tracker fails here: it must never be seen."""
    tracker = folder / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def logged_iteration(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((int(line.split('"iteration": ')[1].split(",")[0]) for line in lines if '"kind": "train"' in line),
               default=0)  # fmt: skip


def is_saving(folder: Path, since: float) -> bool:
    """Whether files are being written that the tracker does not name yet."""
    named = named_iteration(folder)
    try:
        return any(
            int(file.parent.name.removeprefix("iter_")) > named and file.stat().st_mtime > since
            for file in folder.glob("iter_*/*")
        )
    except FileNotFoundError:  # it came and went
        return False


def kill_somewhere(run: ForkedRun, folder: Path, kind: str, rng: random.Random) -> bool:
    """Kill a run during a save, or a few iterations after one; returns whether a save was cut short."""
    started = time.time()
    if kind == "save":
        wait_until(lambda: is_saving(folder, started), run)
        time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.05))))
    else:
        first = named_iteration(folder)
        wait_until(lambda: named_iteration(folder) > first, run)
        iteration = named_iteration(folder) + rng.randint(1, 6)
        wait_until(lambda: logged_iteration(folder) >= iteration, run)
        time.sleep(rng.uniform(0.0, 0.03))
    run.kill(rng.randrange(len(run.pids)))
    return is_saving(folder, started)


@pytest.mark.parametrize(
    ("world_size", "flags", "kills"),
    [
        (1, [], ["save", "train", "save", "save"]),
        (2, ["--use-distributed-optimizer"], ["save", "train"]),
    ],
    ids=["one rank, 4 kills", "two data-parallel ranks, 2 kills"],
)
def test_a_run_that_is_killed_again_and_again(
    server: RunServer, tmp_path: Path, world_size: int, flags: list[str], kills: list[str]
) -> None:
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(20 + world_size)
    run_to_the_end(server, command(whole, *flags, every=LENGTH), world_size)
    cut_short = 0
    for kind in kills:
        run = server.start(command(killed, *flags, every=5), world_size)
        cut_short += kill_somewhere(run, killed, kind, rng)
    assert cut_short >= kills.count("save") // 2, "the kills were meant to hit saves"
    assert 0 < named_iteration(killed) < LENGTH
    run_to_the_end(server, command(killed, *flags, every=5), world_size)
    expected = metrics_of(whole)
    trained = [{k: v for k, v in record.items() if k not in TIMES} for record in records_of(killed, "train")]
    assert len(trained) > LENGTH, "some iterations must have been repeated"
    assert [record for record in trained if record != expected[record["iteration"]]] == []
    assert metrics_of(killed) == expected and len(expected) == LENGTH
    assert_same_weights(whole, killed)


def assert_same_weights(folder: Path, other: Path) -> None:
    mine, theirs = (tensors_of(f / f"iter_{LENGTH:07d}") for f in (folder, other))
    assert mine.keys() == theirs.keys()
    # In the buckets of the distributed optimizer, what memory held lies between the parameters.
    weights = [key for key in mine if ".bucket_idx_" not in key]
    assert [key for key in weights if not torch.equal(mine[key], theirs[key])] == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A .jsonl of 12 MB, seeded, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(3)
    words = ["".join(rng.choices("aeinorstl", k=rng.randint(1, 9))) for _ in range(4000)]
    with open(folder / "text.jsonl", "w") as stream:
        for _ in range(6000):
            stream.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(50, 600)))}) + "\n")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(words)], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder / "tokenizer")
    return folder / "text.jsonl", folder / "tokenizer"


def preprocessing(corpus: tuple[Path, Path], prefix: Path, workers: int = 2) -> list[str]:
    text, tokenizer = corpus
    return [sys.executable, str(PREPROCESS), "--input", str(text), "--output", str(prefix),
            "--tokenizer", str(tokenizer), "--workers", str(workers)]  # fmt: skip


def data_of(prefix: Path) -> list[bytes]:
    return [prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")]


@pytest.fixture(scope="module")
def tokens(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What an undisturbed run writes."""
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    result = run_command(preprocessing(corpus, prefix), timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    return data_of(prefix)


def entries_beside(prefix: Path) -> set[str]:
    """Every file below the output's folder with its size: it changes as long as work is done."""
    found = set()
    for folder, _, files in os.walk(prefix.parent):
        for file in files:
            try:
                found.add(f"{folder}/{file} {os.path.getsize(os.path.join(folder, file))}")
            except FileNotFoundError:
                continue
    return found


def test_preprocessing_that_is_killed_again_and_again(
    corpus: tuple[Path, Path], tokens: list[bytes], tmp_path: Path
) -> None:
    """Two kills, each after so many changes on the disk; what is under a final name is complete at any time."""
    prefix, rng = tmp_path / "train", random.Random(6)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for kill in (os.killpg, os.kill):  # all of them, or the command alone, whose workers must see to themselves
        changes, known = rng.randint(2, 12), entries_beside(prefix)
        process = subprocess.Popen(preprocessing(corpus, prefix), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=environment, process_group=0)  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while changes > 0:
                assert process.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
                time.sleep(0.01)
                found = entries_beside(prefix)
                changes, known = changes - (found != known), found
        finally:
            kill(process.pid, signal.SIGKILL)
            process.wait(10)
        assert not prefix.with_suffix(".idx").exists()
    result = run_command(preprocessing(corpus, prefix), timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert data_of(prefix) == tokens
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.bin", "train.idx", "train.idx.json"]


# --- Full disks -------------------------------------------------------------------------------------------------------

# Arguments: folder, its size, a folder to copy into it, a folder to copy all of it to, command.
ON_TMPFS = """
mount -t tmpfs -o "size=$2" none "$1" && cp -a "$3/." "$1" || exit 99
disk=$1 after=$4; shift 4; "$@"; code=$?; cp -a "$disk/." "$after"; exit $code
"""
UNDER_A_LIMIT = """
cp -a "$3/." "$1" || exit 99
disk=$1 after=$4; ulimit -f "$(($2 / 1024))"; shift 4; "$@"; code=$?; ulimit -f unlimited; cp -a "$disk/." "$after"
exit $code
"""


def on_a_small_disk(
    argv: list[str], disk: Path, before: Path, after: Path, room: int
) -> subprocess.CompletedProcess[str]:
    """Run a command whose folder ``disk``, filled from ``before``, takes no more than ``room`` further bytes.

    Where no file system may be mounted, not even in a user namespace, no file may become larger than ``room``.
    """
    for folder in (disk, before, after):
        folder.mkdir(exist_ok=True)
    used = sum(4096 * (1 + file.lstat().st_size // 4096) for file in before.rglob("*"))
    for namespace in (["unshare", "-m"], ["unshare", "-Urm"]):
        probe = [*namespace, "mount", "-t", "tmpfs", "none", str(disk)]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            shell = [*namespace, "bash", "-c", ON_TMPFS, "bash", disk, str(used + room), before, after]
            return run_command([*shell, *argv], timeout=240)
    return run_command(["bash", "-c", UNDER_A_LIMIT, "bash", disk, str(room), before, after, *argv], timeout=240)


def said_in(output: str) -> str:
    """The one sentence of a command that was refused, which prints no traceback."""
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, output[-3000:]
    assert "Traceback" not in output
    return said[0]


@pytest.fixture(scope="module")
def six(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations, saved after 3 and 6."""
    folder = tmp_path_factory.mktemp("six")
    run_to_the_end(server, [*FLAGS, *RECURSION, *save_to(folder)])
    return folder


def test_a_disk_that_fills_up_during_a_save(server: RunServer, six: Path, tmp_path: Path) -> None:
    before, disk, after = (tmp_path / name for name in ("before", "disk", "after"))
    copy_checkpoint(six, before, 3)
    argv = [sys.executable, str(SCRIPT), *FLAGS, *RECURSION, *save_to(disk)]
    result = on_a_small_disk(["env", f"FAULT={tmp_path}", *argv], disk, before, after, room=300_000)
    said = said_in(result.stderr)
    assert result.returncode == 2
    assert f"The checkpoint of iteration 6 cannot be written to {disk}" in said and "; make room and start" in said
    assert "the last complete one there is 3." in said
    time.sleep(0.5)
    assert processes_with(f"FAULT={tmp_path}") == []
    assert (after / "iter_0000006").is_dir() and named_iteration(after) == 3
    assert metrics_of(after) == {i: metrics_of(six)[i] for i in (4, 5, 6)}
    run_to_the_end(server, [*FLAGS, *RECURSION, *save_to(after)])
    assert named_iteration(after) == 6
    assert metrics_of(after) == {i: metrics_of(six)[i] for i in (4, 5, 6)}


def test_a_disk_that_fills_up_during_preprocessing(
    corpus: tuple[Path, Path], tokens: list[bytes], tmp_path: Path
) -> None:
    before, disk, after = (tmp_path / name for name in ("before", "disk", "after"))
    room = len(tokens[0]) // 3
    result = on_a_small_disk(preprocessing(corpus, disk / "train"), disk, before, after, room)
    assert result.returncode == 2, result.stderr[-2000:]
    assert str(disk) in said_in(result.stderr)
    assert not list(after.glob("train.bin")) and not list(after.glob("train.idx"))
    again = run_command(preprocessing(corpus, after / "train"), timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    assert data_of(after / "train") == tokens


# --- Checkpoints that cannot be read ----------------------------------------------------------------------------------


def refusal(server: RunServer, argv: list[str]) -> str:
    run = server.start(argv)
    assert run.wait() == [2], run.tail()
    return said_in(run.logs[0].read_text())


def test_a_truncated_shard_is_named_and_the_checkpoint_before_it_goes_on(
    server: RunServer, six: Path, tmp_path: Path
) -> None:
    for iteration in (3, 6):
        copy_checkpoint(six, tmp_path, iteration)
    (shard,) = (tmp_path / "iter_0000006").glob("*.distcp")
    os.truncate(shard, shard.stat().st_size * 2 // 3)
    before = files_of(tmp_path)
    said = refusal(server, [*FLAGS, *RECURSION, *save_to(tmp_path)])
    assert f"The checkpoint {tmp_path / 'iter_0000006'} cannot be" in said
    assert f"the last good one beside it is 3: write that number into {TRACKER}, or give --ckpt-step 3" in said
    assert files_of(tmp_path) == before
    by_flag = shutil.copytree(tmp_path, tmp_path / "by_flag")
    run_to_the_end(server, [*FLAGS, *RECURSION, *save_to(by_flag), "--ckpt-step", "3"])
    (tmp_path / TRACKER).write_text("3")
    run_to_the_end(server, [*FLAGS, *RECURSION, *save_to(tmp_path)])
    for folder in (by_flag, tmp_path):
        assert named_iteration(folder) == 6
        assert metrics_of(folder) == {i: metrics_of(six)[i] for i in (4, 5, 6)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab-size", "300"], "was trained with a vocabulary of 127 (this run: 300)"),
        (["--vocab-size", "100"], "was trained with a vocabulary of 127 (this run: 100)"),
        (["--num-layers", "3"], "was trained with --num-layers 2 (this run: 3); give the checkpoint's values."),
        (["--hidden-size", "64", "--swiglu"], "--hidden-size 32 (this run: 64)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_stays(
    server: RunServer, six: Path, flags: list[str], expected: str
) -> None:
    before = files_of(six)
    said = refusal(server, [*FLAGS, *RECURSION, *save_to(six), *flags])
    assert f"The checkpoint {six / 'iter_0000006'} was trained with " in said and expected in said
    assert files_of(six) == before
