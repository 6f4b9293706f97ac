"""The health alarms against two recorded runs of 300 iterations, and the measured line at a start.

``recorded_runs.json``: 2 layers of width 128, T = 2, n = 1, full gradient, CPython's English. ``collapsed``: std 0.02,
rate 2e-3 (held-out loss 6.517, the unigram loss); ``learning``: std 0.088, rate 4e-3 (5.447). Two more that learn, of
which every 10th and 25th iteration was recorded: width 256 (5.434), and one to six hops, detached (95.9% right).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_recursive.plan import RecursionConfig, build_plan
from tests.distributed import run_distributed
from tests.unit_tests.training.runs import FLAGS, RECURSION, save_to
from tests.unit_tests.training.test_run_output import shown_in_worker

RECORDED = json.loads((Path(__file__).parent / "recorded_runs.json").read_text())


def alarms_of(gains: list[float], cosines: list[float], **knobs: int | None) -> dict[int, list[str]]:
    """Iteration to the kinds of alarms that speak."""
    from megatron_recursive.training.metrics_log import HealthAlarms

    recursion = RecursionConfig(num_refinement_blocks=2, **knobs)  # type: ignore[arg-type]
    alarms = HealthAlarms(recursion, build_plan(recursion.resolved(embedding_init_std=0.02)))
    said = {}
    for iteration, (gain, cosine) in enumerate(zip(gains, cosines, strict=True), start=1):
        metrics = {"lm loss block 1": 6.0, "lm loss block 2": 6.0 - gain, "token cosine": cosine}
        found = alarms.observe(iteration, metrics, len(gains))
        if found:
            said[iteration] = [text.split(":")[0] for text in found]
    return said


def recorded(name: str, every: int = 1) -> dict[int, list[str]]:
    gains, cosines = ([value for value in RECORDED[name][what] for _ in range(every)] for what in ("gain", "cosine"))
    return alarms_of(gains, cosines)


def test_a_collapse_is_told_within_a_quarter_of_the_run_and_a_good_run_is_left_alone() -> None:
    collapsed, *learning = run_distributed(all_recorded, 1)[0]
    assert min(collapsed) <= 75 and all("tokens have collapsed" in kinds for kinds in collapsed.values())
    assert any("the state is ignored" in kinds for kinds in collapsed.values())
    assert learning == [{}, {}, {}]


def all_recorded() -> list[dict[int, list[str]]]:
    more = [recorded("width 256, every 10th", 10), recorded("hops, every 25th", 25)]
    return [recorded("collapsed"), recorded("learning"), *more]


def when_they_speak() -> list[dict[int, list[str]]]:
    flat, apart = [0.0] * 6000, [0.1] * 6000
    return [
        alarms_of(flat[:600], apart[:600]),  # a tenth of 600 is 60
        alarms_of(flat, apart),  # never later than 500
        alarms_of(flat[:600], apart[:600], recursion_alarm_after=0),
        alarms_of([-0.05] * 300, apart[:300]),  # harm: from half of the run on
        alarms_of([0.05] * 300, [0.98] * 250 + [0.5] * 50),
        alarms_of(flat[:600], apart[:600], num_supervision_steps=2),  # its first block has the last one's state
    ]


def test_they_speak_from_a_tenth_of_the_run_once_in_fifty_iterations() -> None:
    tenth, late, off, harm, recovered, carried = run_distributed(when_they_speak, 1)[0]
    assert min(tenth) == 60 and min(late) == 500 and off == carried == {}
    assert min(b - a for a, b in zip(tenth, list(tenth)[1:], strict=False)) == 50
    assert list(harm) == [150, 200, 250, 300] and set(sum(harm.values(), [])) == {"the last block does harm"}
    assert list(recovered) == [50, 100, 150, 200, 250]


WIDE = ["--hidden-size", "128", "--train-iters", "1"]


@pytest.mark.parametrize(("flags", "copies"), [([], False), (["--init-method-std", "0.02"], True)])
def test_a_start_says_whether_passes_are_copies(flags: list[str], copies: bool, tmp_path: Path) -> None:
    flags = [*flags, *save_to(tmp_path, 1)]
    stages = ["--pipeline-model-parallel-size", "2", "--log-style", "compact"]
    (first, _), _ = run_distributed(shown_in_worker, 2, [*FLAGS, *RECURSION, *WIDE, *stages, *flags], timeout=120)
    (measured,) = (line for line in first.splitlines() if line.startswith("at the start passes turn"))
    assert ", on 16 random tokens\n" in first
    turns = [float(word) for word in measured.split(" by ")[1].split(" (")[0].split()]
    assert len(turns) == 4 and (max(turns) < 0.1) == copies and (min(turns) > 0.1) != copies
    assert ("WARNING: all passes are near the identity" in first) == copies
    if copies:  # which is no choice any more
        again = [*FLAGS, *RECURSION, *WIDE, *flags, "--train-iters", "2", "--log-style", "compact",
                 "--override-opt_param-scheduler"]
        ((resumed, _),) = run_distributed(shown_in_worker, 1, again, timeout=120)
        assert "iterations 2 to 2" in resumed and "WARNING" not in resumed
        assert "after iteration 1 passes turn" in resumed and "at the start" not in resumed
