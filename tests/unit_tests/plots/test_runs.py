import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plots.runs import read_runs
from tests.unit_tests.plots.records import start, train, valid, write


def test_a_resumed_run_supersedes_what_an_earlier_start_did_after_its_checkpoint(tmp_path):
    file = write(
        tmp_path / "metrics.jsonl",
        start(time=100.0), train(10, 9.0, time=110.0), valid(20, 8.5, time=121.0), train(20, 8.4, time=120.0),
        train(25, 1.0, time=125.0), valid(30, 1.0, time=130.0), {"kind": "alarm", "iteration": 26, "alarm": "lost"},
        start(blocks=2, iteration=20, time=900.0),  # refused, or ended before it logged anything: no start
        start(iteration=20, time=1000.0), train(40, 7.0, time=1020.0), {"kind": "valid", "iteration": 40, "set": 1},
    )  # fmt: skip
    (run,) = read_runs([file])
    assert run.starts == 2 and run.plan is not None and run.plan.num_blocks == 3
    assert [(r["kind"], r["iteration"]) for r in run.records] == [
        ("train", 10), ("valid", 20), ("train", 20), ("train", 40)
    ]  # fmt: skip
    assert run.records[-1]["tokens"] == 40 * 64 and run.records[-1]["flops"] == 40 * 64 * 1e6
    assert [r["elapsed"] for r in run.of("train")] == [10, 20, 21 + 20]  # without the work that was lost


def test_files_of_older_versions_say_iteration_0_of_every_start(tmp_path):
    file = write(tmp_path / "m.jsonl", start(), train(10, 9.0), train(20, 8.0), start(), train(20, 7.0), train(30, 6.0))
    (run,) = read_runs([file])
    assert run.starts == 2 and [r["lm loss"] for r in run.records] == [9.0, 7.0, 6.0]
    assert all("elapsed" not in r for r in run.records)


def test_runs_are_found_in_folders_and_named_by_what_tells_them_apart(tmp_path):
    places = ("runs/default/checkpoints", "runs/plain/checkpoints", "other/default")
    files = [write(tmp_path / place / "metrics.jsonl", start(), train(1, 1.0)) for place in places]
    given = [tmp_path / "runs/default", tmp_path / "runs/plain/checkpoints", files[2]]
    assert [run.name for run in read_runs(given[:2])] == ["default", "plain"]
    assert [run.name for run in read_runs(given)] == ["runs/default", "runs/plain", "other/default"]
    assert [run.name for run in read_runs(given[:1])] == ["default"]
    with pytest.raises(UserError, match="runs holds no metrics.jsonl.* name .*runs/default.* or .*runs/plain"):
        read_runs([tmp_path / "runs"])
    with pytest.raises(UserError, match="is named twice"):
        read_runs([tmp_path / "runs/default", files[0]])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="name the --save folder of a run"):
        read_runs([tmp_path / "empty"])


def test_a_run_s_plan_has_the_depth_of_its_last_evaluation(tmp_path):
    grown, other = valid(1, 3.0, recurrence=4), valid(2, 3.0)
    for records, depth in (([], 3), ([grown], 4), ([grown, other], 3)):  # the last start may have left growth out
        (run,) = read_runs([write(tmp_path / "metrics.jsonl", start(blocks=3), train(1, 4.0), *records)])
        assert run.plan is not None and run.plan.depth == depth


def test_what_was_evaluated_alone_replaces_nothing_that_training_recorded(tmp_path):
    deeper = start(blocks=5, iteration=20, time=900.0)
    finished, anew = start(iteration=20, time=500.0), start(iteration=0, time=1.0)
    trained = [start(time=100.0), train(20, 8.0, time=120.0), valid(20, 6.26, time=125.0)]
    alone = [finished, valid(20, 6.374, time=505.0), {**valid(20, 6.4, time=506.0), "kind": "test"}, deeper,
             valid(20, 5.0, time=910.0), valid(30, 5.0, time=911.0)]  # fmt: skip
    (run,) = read_runs([write(tmp_path / "m.jsonl", anew, valid(0, 9.0, time=2.0), *trained, *alone)])
    assert run.starts == 1 and run.plan is not None and run.plan.num_blocks == 3
    assert [(r["kind"], r["iteration"], r["lm loss"]) for r in run.records] == [
        ("valid", 0, 9.0), ("train", 20, 8.0), ("valid", 20, 6.26), ("test", 20, 6.4)
    ]  # fmt: skip
    assert [r.get("elapsed") for r in run.records] == [None, 20.0, 25.0, None]
    (run,) = read_runs([write(tmp_path / "m.jsonl", finished, valid(20, 6.0), deeper, valid(20, 5.0))])
    assert [r["lm loss"] for r in run.records] == [5.0], "nothing was trained: the last evaluation counts"


def test_flops_add_up_over_parts_of_another_depth(tmp_path):
    """Of a part that began at 20, where the earlier one was last logged at 10; what records tell of it counts."""
    file = write(
        tmp_path / "m.jsonl", start(time=1.0, flops=1e6), train(10, 9.0, tokens=640), train(30, 9.0, tokens=1920),
        start(iteration=20, time=9.0, flops=4e6) | {"tokens": 1280}, train(30, 8.0, tokens=1920),
        start(iteration=30, time=20.0, flops=1e6), train(40, 7.0, tokens=2560), train(50, 7.0, tokens=3200, FLOPs=9e9),
        start(iteration=50, time=30.0, flops=2e6), train(60, 6.0, tokens=3840),
    )  # fmt: skip
    (run,) = read_runs([file])
    assert [r["flops"] for r in run.records] == [
        640e6, 1280e6 + 640 * 4e6, 1280e6 + 640 * 5e6, 9e9, 9e9 + 640 * 2e6
    ]  # fmt: skip
