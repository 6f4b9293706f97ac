"""The command ``ablate``: its file, the rates and budgets it chooses, what it runs and runs again, what it writes."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.ablation import runs, schedule
from megatron_recursive.ablation.config import SCHEMA, Arm, read_config
from megatron_recursive.ablation.runs import Study
from megatron_recursive.accounting import ModelShape, count_parameters, flops_per_token
from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.training.describe import describe
from tests.distributed import REPOSITORY, _is_running, run_distributed
from tests.grids import grid
from tests.unit_tests.inference.folders import write_plain
from tests.unit_tests.training.test_data_cache import write as write_data

FAKE = str(Path(__file__).with_name("fake_training.py"))
CONFIG = """
flags: [--num-layers 2, --eval-iters 5, --best-rate, 2e-3]
arms:
  recursion, deep: --blocks 3
  own layers: --num-layers=2
learning_rates: [1e-3, 4e-3, 0.002]
seeds: [3, 1]
iterations: 10
"""


def write(folder: Path, text: str = CONFIG) -> str:
    (folder / "study.yaml").write_text(text)
    return str(folder / "study.yaml")


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    ablation = read_config(write(tmp_path, SCHEMA))
    recursion, layers, deep = ablation.arms
    assert (recursion.rates, deep.rates) == ((2e-3, 4e-3, 8e-3), (1e-3, 2e-3))  # texts, to YAML 1.1
    assert (deep.processes, layers.processes) == (2, 1) and "--nproc-per-node" not in deep.flags
    assert deep.flags[-3:] == ("--num-layers", "8", "--disable-recursive-refinement")
    assert recursion.flags[:4] == ("--num-layers", "2", "--hidden-size", "128")
    assert (ablation.seeds, ablation.iterations) == ((1, 2, 3), 300)
    assert (ablation.equal, ablation.reference) == ("tokens", "recursion")
    ablation = read_config(write(tmp_path, SCHEMA.replace("equal: tokens", "equal: {flops: deep}")), "elsewhere")
    assert (ablation.equal, ablation.reference, str(ablation.output)) == ("flops", "deep", "elsewhere")


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("learning_rates:", "learning_rate:", "there is no learning_rate; the nearest is learning_rates"),
    ("own layers: --num-layers=2", "own: {flag: --x}", "there is no arms.own.flag; the nearest is flags"),
    ("iterations: 10", "iterations: 10\nequal: {flops: recursion}", "equal: flops: recursion; the nearest is recur"),
    ("iterations: 10", "iterations: 10\nequal: time", "there is no equal: time; the nearest is tokens or flops"),
    ("iterations: 10", "iterations: 1.5", "iterations must be positive whole numbers, but are 1.5"),
    ("iterations: 10", "", "iterations is missing"),
    ("seeds: [3, 1]", "seeds: [3, x]", "seeds must be positive whole numbers"),
    ("1e-3,", "1e-3, -2,", "learning_rates must be positive numbers"),
    ("--blocks 3", "--blocks 3 --lr 3", "arms.recursion, deep must not hold --lr, which follows from learning_rates"),
    ("--eval-iters 5", "--seed=5", "flags must not hold --seed, which follows from seeds"),
    ("--blocks 3", "--blocks '3", "No closing quotation"),
    ("--blocks 3", "--nproc-per-node x", "--nproc-per-node: invalid int value"),
    ("own layers: --num-layers=2", "own: --x\n  own: --y", ".yaml:6: own stands there twice"),
    ("seeds: [3, 1]", "seeds: [3, 1]\noutput: 3", "output must be a folder's name, but is 3"),
    ("iterations: 10", "iterations: [10, 20]", "iterations must be one number, but are [10, 20]"),
    ("--blocks 3", "--nproc-per-node 0", "arms.recursion, deep: --nproc-per-node must be at least 1, but is 0"),
    ("arms:", "arms: [", ".yaml:5: expected ','"),
    (CONFIG, "- 3", "it must hold keys and values"),
    ("--eval-iters 5", "--eval-iters=0", "arms.recursion, deep: give --eval-iters"),
    ("--num-layers 2,", "", "arms.recursion, deep: --num-layers missing."),
])  # fmt: skip
def test_a_mistake_is_one_sentence_with_file_and_key(
    old: str, new: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(runs, "DESCRIBE", [sys.executable, FAKE])
    file = write(tmp_path, CONFIG.replace(old, new))
    with pytest.raises(SystemExit) as stop:
        main(["ablate", file, "--output", str(tmp_path / "out"), "--dry-run"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and sentence in err, err
    assert (file in err) == (old not in ("--eval-iters 5", "--num-layers 2,") or "must not" in err)


# --- budgets and choices --------------------------------------------------------------------------------------------


def study_of(
    folder: Path, text: str = CONFIG, carried: tuple[str, ...] = (), plan: str = "", data: str = "", donors: str = "",
    **facts: tuple[int, float],
) -> Study:  # fmt: skip
    ablation = read_config(write(folder, text), str(folder / "out"))
    costs = facts or {arm.name: (64, 1e3) for arm in ablation.arms}
    given = dict(zip([arm.name for arm in ablation.arms], costs.values(), strict=True))

    def described(_: Any, counts: dict[Arm, int]) -> dict[str, dict[str, Any]]:
        return {arm.name: {"iterations": count, "tokens per iteration": t, "FLOPs per token": f, "plan": plan,
                           "tokens read per iteration": t / 4 if arm.name in carried else t, "data": data,
                           "donors": donors}
                for arm, count in counts.items() for t, f in [given[arm.name]]}  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_described", described)
        return Study(ablation, runs.facts_of(ablation))


def test_equal_flags_of_another_plan_are_another_run(tmp_path: Path) -> None:
    """A default that has changed: what an earlier version trained is not this version's."""
    first, again, other = (study_of(tmp_path, plan=plan) for plan in ("cut", "cut", "whole"))
    here, there, elsewhere = (study.grid(study.ablation.arms[0])[0].folder for study in (first, again, other))
    assert here == there != elsewhere


def test_equal_flags_of_other_data_or_donors_are_another_run(tmp_path: Path) -> None:
    def folder(data: str, donors: str = "") -> Path:
        study = study_of(tmp_path, data=data, donors=donors)
        return study.grid(study.ablation.arms[0])[0].folder

    assert len({folder(""), folder("a"), folder("b"), folder("", "a"), folder("", "b")}) == 5
    assert folder("a") == folder("a") and folder("", "a") == folder("", "a")
    assert folder("").name == "lr0.001_seed3_e2f057a2", "results of earlier versions stay"


@pytest.mark.parametrize(("equal", "expected"), [
    ("tokens", (1000, 500)), ("{tokens: own layers}", (2000, 1000)),
    ("flops", (1000, 1750)), ("{flops: own layers}", (571, 1000)),
])  # fmt: skip
def test_all_arms_spend_what_the_reference_spends(equal: str, expected: tuple[int, int], tmp_path: Path) -> None:
    text = CONFIG.replace("iterations: 10", f"iterations: 1000\nequal: {equal}")
    study = study_of(tmp_path, text, a=(64, 7e3), b=(128, 2e3))
    iterations = tuple(map(study.iterations, study.ablation.arms))
    first, second = (study.grid(arm)[0] for arm in study.ablation.arms)
    assert iterations == expected == (first.iterations, second.iterations)
    carried = study_of(tmp_path, text, ("own layers",), a=(64, 7e3), b=(128, 2e3))
    if "flops" not in equal:  # four steps on each batch read a quarter of it each
        assert carried.iterations(carried.ablation.arms[1]) == 4 * expected[1] or "own" in equal
        assert carried.iterations(carried.ablation.arms[0]) * 4 == expected[0] or "own" not in equal
    if "flops" in equal:
        assert first.flops == pytest.approx(second.flops, rel=1e-3)
    assert f"--train-iters {expected[0]} " in " ".join(first.words)


@pytest.mark.parametrize("cheap", [100, 400, 950])
def test_an_arm_whose_cost_goes_by_iterations_is_counted_at_its_own(
    cheap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 950 a count at 1000 gives 952, one there 998, and so to and fro."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(runs, "DESCRIBE", [sys.executable, FAKE])
    text = CONFIG.replace("--blocks 3", f"--cheap-until {cheap}")
    text = text.replace("iterations: 10", "iterations: 1000\nequal: {flops: own layers}")
    ablation = read_config(write(tmp_path, text), "out")
    study = Study(ablation, runs.facts_of(ablation))
    first, second = (study.grid(arm)[0] for arm in ablation.arms)
    assert first.iterations == (1000 + cheap) / 2 and first.flops == pytest.approx(second.flops)
    assert first.flops == pytest.approx(64 * 2e3 * (2 * first.iterations - cheap)), "told of as many steps as are run"
    late = read_config(write(tmp_path, text.replace(f"until {cheap}", "until 999 --num-layers 4")), "out")
    with pytest.raises(UserError, match="arms.recursion, deep: --cheap-until ends behind"):
        runs.facts_of(late)


def test_the_rate_is_chosen_when_the_grid_has_ended_by_itself(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    arm, other = study.ablation.arms
    low, mid, high = study.grid(arm)
    assert [run.rate for run in (low, mid, high)] == [1e-3, 2e-3, 4e-3] and {run.seed for run in study.grid(arm)} == {3}
    study.results |= {low: {"loss": 4.0}, mid: {"loss": 5.0}}
    assert study.best(arm) is None and len(study.due()) == 4
    study.failures[high], study.unjudged = "ended by SIGKILL", {high}
    assert study.best(arm) is None, "a signal says nothing of the rate"
    study.unjudged = set()
    assert study.best(arm) == 1e-3, "a rate that failed by itself is out"
    study.results[low]["loss"] = float("nan")
    assert study.best(arm) == 2e-3
    (spread,) = [run for run in study.due() if run.arm == arm]
    assert (spread.rate, spread.seed) == (2e-3, 1) and study.size()[0] == 8


def test_flags_of_a_run(tmp_path: Path) -> None:
    study = study_of(tmp_path, CONFIG.replace("--blocks 3", "--blocks 3 --min-lr 0 --save-interval 7"))
    mine, plain = (study.grid(arm)[0] for arm in study.ablation.arms)
    words = " ".join(mine.words)
    assert words.index("--min-lr 0.0001") < words.index("--min-lr 0 --save-interval 7"), "a later flag wins"
    assert f"--save {mine.folder} --load {mine.folder}" in words and "--lr 0.001 --seed 3 --train-iters 10" in words
    assert f"--data-cache-path {mine.folder}/cache" in words
    again = study_of(tmp_path, CONFIG.replace("--blocks 3", "--blocks 4"))
    changed, same = (again.grid(arm)[0] for arm in again.ablation.arms)
    assert changed.folder != mine.folder and changed.folder.parent == mine.folder.parent and same.folder == plain.folder


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert schedule.places(None) == [""] * len(os.sched_getaffinity(0)) and schedule.places(3) == [""] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert schedule.places(None) == [""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-a,-1")
    assert schedule.places(None) == schedule.places(5) == ["2", "GPU-a"] and schedule.places(1) == ["2"]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ablate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command with a training that takes no time; returns exit code, stdout and results.json."""
    monkeypatch.setattr(runs, "DESCRIBE", [sys.executable, FAKE])
    monkeypatch.setattr(schedule, "COMMAND", [sys.executable, FAKE])
    monkeypatch.setattr(schedule, "POLL_S", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    installed = importlib.import_module("matplotlib")  # to be put back: a second import would make another module
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing takes longer than such runs

    def run(text: str, *words: str) -> tuple[int, str, dict[str, Any]]:
        code = 0
        try:
            main(["ablate", write(tmp_path, text), "--output", str(tmp_path / "out"), *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        results = tmp_path / "out" / "results.json"
        return code, capsys.readouterr().out, json.loads(results.read_text()) if results.exists() else {}

    run.matplotlib = installed  # type: ignore[attr-defined]
    return run


def starts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Arm and folder of a run -> its starts."""
    found = sorted((folder / "out" / "runs").glob("*/*/starts"))
    lines = [(file.parts, file.read_text().splitlines()) for file in found]
    return {f"{parts[-3]} {parts[-2][:-9]}": [json.loads(line) for line in each] for parts, each in lines}


def test_rates_then_seeds_then_results(ablate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, figures = ablate(CONFIG, "--dry-run")
    assert (code, figures, starts(tmp_path)) == (0, {}, {})
    assert "8 runs of" in out and "no run has been timed yet" in out and "and 2 more" in out
    code, out, figures = ablate(CONFIG, "--jobs", "3")
    assert code == 0 and figures["version"] == 1 and len(figures["runs"]) == figures["planned"] == 8
    assert {name: len(each) for name, each in starts(tmp_path).items()} == {
        f"{arm} {run}": 1 for arm in ("own-layers", "recursion-deep")
        for run in ("lr0.001_seed3", "lr0.002_seed3", "lr0.004_seed3", "lr0.002_seed1")
    }  # fmt: skip
    assert {each["threads"] for (each,) in starts(tmp_path).values()} == {os.environ.get("OMP_NUM_THREADS", "1")}
    deep, own = figures["arms"]
    assert (deep["lr"], deep["edge"], deep["losses"]) == (2e-3, None, pytest.approx([3.02, 3.0]))
    assert (own["mean"], own["spread"]) == pytest.approx((3.06, 0.02)) and own["blocks"] == []
    assert (deep["stacks"], own["stacks"]) == ({"core": [90, 3]}, {"core": [90, 1]})
    assert deep["blocks"] == pytest.approx([3.21, 3.11, 3.01]) and deep["token cosine"] == 0.25
    (said,) = figures["comparisons"]
    assert said["said"] == (
        "recursion, deep beats own layers (its own layers): 3.010 against 3.060, 0.050 nats better, more than the "
        "spread of 0.020 over the seeds, at 9 times the FLOPs."
    )
    run = figures["runs"][0]
    assert run["commit"]["hash"] == "abcdef1234" and (run["tokens"], run["seconds"]) == (640, 8.0)
    assert run["held out"]["token cosine"] == 0.25 and run["FLOPs"] == 640 * 18e3
    table = (tmp_path / "out" / "results.md").read_text()
    assert "8 of 8 runs done" in table and f"* {said['said']}" in table and said["said"] in out
    assert "the picture needs matplotlib" in out and not (tmp_path / "out" / "results.png").exists()
    kept = {checkpoint.name for checkpoint in (tmp_path / "out").glob("runs/*/*/iter_*")}
    assert kept == {"iter_0000010"}, "of a run that is done the last checkpoint stays"
    before = starts(tmp_path)
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "matplotlib", ablate.matplotlib)
        assert ablate(CONFIG)[0] == 0 and starts(tmp_path) == before, "what is done is not run again"
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    assert "about 0.00 hours" in ablate(CONFIG, "--dry-run")[1]
    text = CONFIG.replace("best-rate, 2e-3", "best-rate, 4e-3").replace("seeds: [3, 1]", "seeds: [3]")
    code, _, figures = ablate(text)
    assert [arm["edge"] for arm in figures["arms"]] == ["best at the edge: add a higher rate"] * 2
    assert "a single seed has no spread" in figures["comparisons"][0]["said"]


def test_without_a_plain_arm_each_is_compared_with_the_first_of_its_width(ablate: Any) -> None:
    text = CONFIG.replace("own layers: --num-layers=2", "late: --blocks 3\n  wide: --blocks 3 --hidden-size 16")
    _, _, figures = ablate(text + "equal: tokens\n")
    assert [(each["arm"], each["against"]) for each in figures["comparisons"]] == [("late", "recursion, deep")]


def test_failures_do_not_stop_the_others_and_a_killed_run_goes_on(ablate: Any, tmp_path: Path) -> None:
    text = CONFIG.replace("--blocks 3", "--blocks 3 --killed-once")
    text = text.replace("--num-layers=2", "--diverges-above 3e-3")
    code, out, figures = ablate(text, "--jobs", "2")
    assert code == 1 and "4 of 8 runs failed; the same command tries them again." in out
    killed = [each for each in figures["failed"] if "SIGKILL" in each]
    (diverged,) = [each for each in figures["failed"] if each not in killed]
    log = next((tmp_path / "out" / "runs" / "own-layers").glob("lr0.004*")) / "log.txt"
    assert diverged == f"own layers, lr 0.004, seed 3: The loss is not a number; try a lower --lr (log: {log})."
    assert len(killed) == 3 and "ended by SIGKILL; the same command goes on with it" in killed[0]
    deep, own = figures["arms"]
    assert (deep["lr"], deep["losses"]) == (None, [])
    assert (own["lr"], own["edge"], len(own["losses"])) == (2e-3, None, 2), "a rate that failed is tried all the same"
    code, out, figures = ablate(text, "--jobs", "2")
    assert code == 1 and "2 of 8 runs failed" in out and figures["arms"][0]["lr"] == 2e-3
    counts = {name: len(each) for name, each in starts(tmp_path).items()}
    again = {name for name, count in counts.items() if count == 2}
    assert again == {"own-layers lr0.004_seed3", *(n for n in counts if n.startswith("recursion") and "seed3" in n)}


def test_an_arm_of_several_processes_takes_as_many_places(
    ablate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    text = CONFIG.replace("--blocks 3", "--blocks 3 --nproc-per-node 2").replace("[1e-3, 4e-3, 0.002]", "[2e-3]")
    assert ablate(text)[0] == 0
    devices = {name.split(" ")[0]: each["devices"] for name, (each,) in starts(tmp_path).items()}
    assert set(devices["recursion-deep"].split(",")) == {"4", "5"} and devices["own-layers"] in ("4", "5")
    assert starts(tmp_path)["recursion-deep lr0.002_seed3"][0]["argv"][:3] == ["pretrain", "--nproc-per-node", "2"]


    text = text.replace("--nproc-per-node 2", "--nproc-per-node 3")
    assert ablate(text)[0] == 2


def command(folder: Path, text: str, terminal: int) -> subprocess.Popen[bytes]:
    program = f"""if True:
        import sys
        from megatron_recursive.ablation import runs, schedule
        from megatron_recursive.commands import main
        sys.modules["matplotlib"], runs.DESCRIBE, schedule.COMMAND = None, *[[sys.executable, {FAKE!r}]] * 2
        main(sys.argv[1:])"""
    words = ["ablate", write(folder, text), "--output", str(folder / "out"), "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stdout=terminal,
                            stderr=terminal)  # fmt: skip


@pytest.mark.parametrize("number", grid([signal.SIGINT, signal.SIGKILL], quick=[signal.SIGINT]))
def test_no_run_outlives_the_ablation(number: signal.Signals, ablate: Any, tmp_path: Path) -> None:
    text = CONFIG.replace("--blocks 3", "--blocks 3 --sleep").replace("[1e-3, 4e-3, 0.002]", "[2e-3]")
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    shown: list[bytes] = []  # read as it is written: a terminal that is full blocks who writes
    threading.Thread(target=lambda: shown.extend(iter(lambda: os.read(master, 10_000), b"")), daemon=True).start()
    process = command(tmp_path, text, terminal)
    results, deadline = tmp_path / "out" / "results.json", time.monotonic() + 60
    while not results.exists() or not json.loads(results.read_text())["runs"] or len(starts(tmp_path)) < 3:
        assert time.monotonic() < deadline and process.poll() is None, shown
        time.sleep(0.05)
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", write(tmp_path, text), "--output", str(tmp_path / "out")])
    sleeping = [each["pid"] for name, runs in starts(tmp_path).items() for each in runs if name.startswith("recursion")]
    os.kill(process.pid, number)
    assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    while any(_is_running(pid) for pid in sleeping):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while number == signal.SIGINT and b"stopped: 1 of 4 runs are done" not in b"".join(shown):
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)
    assert b"FLOP/s, 1 of 4 runs" in b"".join(shown)
    done = json.loads(results.read_text())
    assert [run["arm"] for run in done["runs"]][:1] == ["own layers"] and done["failed"] == []
    code, _, figures = ablate(text)
    assert code == 0 and len(figures["runs"]) == 4
    assert {name: len(each) for name, each in starts(tmp_path).items()}["own-layers lr0.002_seed3"] == 1


def test_two_ablations_do_not_share_a_folder(ablate: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ablate(CONFIG)[0] == 2
    assert ablate(CONFIG, "--jobs", "0")[0] == 2 and starts(tmp_path) == {}


# --- the real thing -------------------------------------------------------------------------------------------------

REAL = """
flags: >
  --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
  --micro-batch-size 2 --global-batch-size 4 --mock-data --split 90,5,5 --tokenizer-type NullTokenizer --vocab-size 127
  --eval-iters 2 --eval-interval 100 --log-interval 1 --num-workers 0
arms:
  recursion: --num-refinement-blocks 2 --num-latent-refinements 1
  own layers: --disable-recursive-refinement
learning_rates: [1e-2]
seeds: [1]
iterations: 4
equal: flops
"""


def test_what_training_says_of_an_arm(tmp_path: Path) -> None:
    common = [*REAL.split("flags: >")[1].split("arms:")[0].split(), "--lr", "1e-2", "--train-iters", "4"]
    core = ["--num-refinement-blocks", "2", "--num-latent-refinements", "1"]
    flags = {"core": core, "wrong": ["--hidden-size", "33"], "off": ["--disable-recursive-refinement"]}
    flags["carried"] = [*core, "--num-supervision-steps", "4"]
    flags["grown"] = [*core, "--grow-depth-at", "0.5:3"]
    flags["loops"] = [*"--recursion-family recurrent --num-layers 3 --num-coda-layers 1 --num-recurrences 4".split(),
                      "--injection", "concat"]  # fmt: skip
    asked = {name: {"processes": 2, "flags": [*common, *each]} for name, each in flags.items()}
    write_data(tmp_path / "data", 20, 0)
    on_data = [each for each in common if each != "--mock-data"]
    asked["on data"] = {"processes": 2, "flags": [*on_data, *core, "--data-path", str(tmp_path / "data")]}
    taught = ["--vocab-size", "257", "--distill-from", str(write_plain(tmp_path / "donor"))]
    asked["taught"] = {"processes": 1, "flags": [*common, *core, *taught]}
    (facts,) = run_distributed(describe, 1, asked)
    shape = ModelShape(1, 32, 128, 4, 4, 8, 128, 16)
    for name, knobs in (("core", {"num_refinement_blocks": 2, "num_latent_refinements": 1}),
                        ("off", {"enable_recursive_refinement": False})):  # fmt: skip
        plan = build_plan(RecursionConfig(**knobs).resolved(embedding_init_std=0.02))  # type: ignore[arg-type]
        assert facts[name]["FLOPs per token"] == flops_per_token(shape, plan).total
        assert facts[name]["plain"] == (name == "off") and facts[name]["passes"] == plan.num_passes
        assert (facts[name]["tokens per iteration"], facts[name]["world size"]) == (64, 2)
    assert [facts[n]["tokens read per iteration"] for n in ("core", "carried")] == [64, 16]
    layer = facts["off"]["stacks"]["core"][0]
    assert layer == count_parameters(shape, plan).layers and facts["core"]["stacks"] == {"core": (layer, 4)}
    stacks = {"core": (2 * layer, 4), "coda": (layer, 1), "injection": (2 * 32 * 32, 4)}
    assert facts["core"]["data"] == "" != facts["on data"]["data"]
    assert facts["core"]["donors"] == "" != facts["taught"]["donors"]
    assert facts["loops"]["stacks"] == stacks, "what phi counts"
    assert [facts[name]["passes"] for name in ("carried", "grown")] == [16, 6], "of what the held-out loss is of"
    assert facts["grown"]["stacks"] == {"core": (layer, 6)}
    assert list(facts["wrong"]) == ["error"] and "33" in facts["wrong"]["error"]


@pytest.mark.heavy
def test_two_real_runs(tmp_path: Path) -> None:
    words = ["ablate", write(tmp_path, REAL), "--output", str(tmp_path / "out"), "--jobs", "2"]
    result = subprocess.run([sys.executable, "-m", "megatron_recursive", *words], capture_output=True, text=True,
                            cwd=REPOSITORY)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    recursion, own = figures["arms"]
    assert recursion["FLOPs"] == pytest.approx(own["FLOPs"], rel=0.1) and own["iterations"] > recursion["iterations"]
    assert len(recursion["blocks"]) == 2 and recursion["token cosine"] is not None and 3 < own["mean"] < 6
    assert all(run["commit"] is None or len(run["commit"]["hash"]) == 40 for run in figures["runs"])
    assert all(run["seconds"] > 0 for run in figures["runs"]) and len(figures["runs"]) == 2


def test_an_arm_whose_worst_seed_is_ahead_wins_whatever_the_losers_spread() -> None:
    from megatron_recursive.ablation.results import _compare

    def arm(name: str, *losses: float) -> dict[str, Any]:
        return {"arm": name, "losses": losses, "mean": sum(losses) / len(losses), "spread": max(losses) - min(losses),
                "FLOPs": 1.0, "plain": False, "layers": 1}  # fmt: skip

    assert "a beats b: 0.010 against 0.900" in _compare(arm("a", 0.0, 0.02), arm("b", 0.4, 1.4))["said"]
    assert "does not beat" in _compare(arm("a", 0.0, 0.5), arm("b", 0.4, 1.4))["said"]
