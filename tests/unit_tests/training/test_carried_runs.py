"""Runs whose iterations are steps on carried batches: what is read and counted, resumed, and spread over ranks."""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import FLAGS, RECURSION, copy_checkpoint, metrics_of, records_of, save_to, train

STEPS, LAST = 4, 10
CARRIED = ["--num-supervision-steps", str(STEPS)]
STILL = ["--hidden-dropout", "0", "--attention-dropout", "0", "--global-batch-size", "8", "--train-iters", str(LAST),
         "--lr-decay-iters", "20"]  # fmt: skip
HALTING = [*CARRIED, "--carry-halted", "--halt-bias", "5", "--halt-threshold", "0.01"]  # at once, unless it explores
EXPLORING = [*HALTING, "--halt-exploration", "0.6"]
COUNTS = ("consumed samples", "tokens")


def run(folder: Path, *flags: str, world_size: int = 1) -> dict[int, dict[str, Any]]:
    said = train(*save_to(folder, STEPS), *STILL, *flags, world_size=world_size)
    assert said is None, said
    return metrics_of(folder)


def without_counts(metrics: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {i: {n: v for n, v in each.items() if n not in COUNTS} for i, each in metrics.items()}


def check_rates(folder: Path) -> None:
    """Tokens per second are those of the column beside them, of the data."""
    for before, each in pairwise([{"tokens": 0}, *records_of(folder, "train")]):
        assert each["tokens per second"] * each["seconds"] == pytest.approx(each["tokens"] - before["tokens"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *CARRIED, "--eval-iters", "1", "--eval-interval", str(LAST))


def test_iterations_are_optimizer_steps_and_a_batch_counts_when_it_is_over(whole: Any, tmp_path: Path) -> None:
    folder, metrics = whole
    once = run(tmp_path)
    assert [each["learning rate"] for each in metrics.values()] == [each["learning rate"] for each in once.values()]
    assert [each["consumed samples"] for each in metrics.values()] == [0, 0, 0, 8, 8, 8, 8, 16, 16, 16]
    check_rates(folder)
    assert metrics[1]["lm loss"] == pytest.approx(once[1]["lm loss"], rel=1e-6)
    assert [each["FLOPs"] / metrics[1]["FLOPs"] for each in metrics.values()] == list(range(1, LAST + 1))
    (evaluated,) = records_of(folder, "valid")
    assert f"lm loss block {2 * STEPS}" in evaluated, "an evaluation runs all steps"
    batch, others = [metrics[i]["lm loss"] for i in (1, 2, 3, 4)], [once[i]["lm loss"] for i in (1, 2, 3, 4)]
    assert batch[3] < others[3] - 0.3, "a batch that is seen again is soon known"


def _blocks_exported(folder: str) -> int:
    from megatron_recursive.hf.convert.export import open_checkpoint

    return open_checkpoint(folder).plan.num_blocks


def test_readers_of_the_run_know_the_depth_that_was_evaluated(whole: Any) -> None:
    from megatron_recursive.report.answers import losses_by_depth
    from megatron_recursive.report.subjects import find_subjects

    ((subject,), _) = find_subjects([str(whole[0])])
    assert subject.plan is not None and subject.plan.depth == 2 * STEPS and subject.figures["passes"] == 4 * STEPS
    assert losses_by_depth(subject)[1] == {"depth": 2 * STEPS, "loss": subject.figures["held out"]}


def test_an_export_is_all_steps_in_a_row(whole: Any) -> None:
    assert run_distributed(_blocks_exported, 1, str(whole[0])) == [2 * STEPS]


def test_a_resume_at_a_batch_is_exact_and_within_one_starts_it_again(whole: Any, tmp_path: Path) -> None:
    folder, metrics = whole
    copy_checkpoint(folder, tmp_path / "exact", STEPS)
    resumed = run(tmp_path / "exact", *CARRIED)
    assert resumed == {i: each for i, each in metrics.items() if i > STEPS}
    copy_checkpoint(folder, tmp_path / "within", LAST)
    onward = run(tmp_path / "within", *CARRIED, "--train-iters", "14", "--override-opt_param-scheduler")
    assert [each["consumed samples"] for each in onward.values()] == [16, 24, 24, 24]


def _where_data_begins(consumed: int, iteration: int, size: int) -> list[int]:
    """The iteration that Megatron's loaders see, and the sample at which the one of training begins."""
    import megatron.training
    from megatron.training import training

    from megatron_recursive.training.patches import loaders

    run, seen = Namespace(iteration=iteration, train_iters=LAST, consumed_train_samples=consumed,
                          num_supervision_steps=STEPS, dataloader_type="single"), list[int]()  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron.training, "get_args", lambda: run)
        patch.setattr(training, "build_train_valid_test_data_loaders", lambda provider: seen.append(run.iteration))
        patch.setattr(training, "build_pretraining_data_loader", lambda dataset, consumed_samples: seen.append(
            consumed_samples))  # fmt: skip
        loaders.install()
        training.build_train_valid_test_data_loaders(None)
        training.build_pretraining_data_loader(range(size), consumed)
    assert run.iteration == iteration
    return seen


def test_a_stop_by_a_signal_within_the_first_batch_skips_none() -> None:
    ended = (24, LAST, 24), [LAST, 23]  # which reads no more
    for given, seen in (((0, 2, 24), [0, 0]), ((8, 5, 24), [5, 8]), ((24, 5, 24), [5, 24]), ended):
        assert run_distributed(_where_data_begins, 1, *given) == [seen]


def _consumed_by_a_step(exits: bool, halted: bool) -> int:
    """Behind 24 samples, by a skipped step within a batch of 8; Megatron is about to add the batch, unless it exits."""
    import torch

    from megatron_recursive.training import supervision_steps

    run = Namespace(num_supervision_steps=STEPS, carry_halted=halted, micro_batch_size=2, data_parallel_size=1,
                    consumed_train_samples=24)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision_steps, "get_num_microbatches", lambda: 4)
        steps = supervision_steps.SupervisionSteps(run, torch.nn.Linear(1, 1), None)
        steps.step(STEPS + 1, lambda: ({}, True, False, exits, 17 * exits, None, None, 0))
    return run.consumed_train_samples


def test_a_bad_loss_leaves_the_place_in_the_data() -> None:
    for exits, halted, consumed in ((True, False, 24), (True, True, 24), (False, False, 24 - 8)):
        assert run_distributed(_consumed_by_a_step, 1, exits, halted) == [consumed]


def test_samples_that_halt_at_once_are_a_run_without_carried_states(tmp_path: Path) -> None:
    flags = ["--halt-bias", "5", "--halt-threshold", "0.01"]
    once, halting = run(tmp_path / "once", *flags), run(tmp_path / "halting", *HALTING, "--halt-exploration", "0")
    for each in once.values():
        del each["output change block 1"]  # of carried states the last stage does not know it
    assert {i: {n: v for n, v in each.items() if n != "FLOPs"} for i, each in halting.items()} == once
    check_rates(tmp_path / "halting")


PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {"TP 2 x PP 2": (2, 2, 4), "PP 2 x DP 2": (1, 2, 4), "PP 2": (1, 2, 2)}
OVER_RANKS = {"fixed": CARRIED, "exploring": EXPLORING}
CASES = [("TP 2 x PP 2", "exploring"), ("TP 2 x PP 2", "fixed"), ("PP 2 x DP 2", "fixed"), ("PP 2", "exploring")]


@pytest.mark.parametrize(("layout", "case"), grid(CASES, quick=[]))
def test_a_layout_reads_what_one_process_does(tmp_path: Path, layout: str, case: str) -> None:
    start = tmp_path / "start"
    train(*save_to(start, STEPS), *STILL, *OVER_RANKS[case], "--exit-interval", str(STEPS))
    tp, pp, ranks = LAYOUTS[layout]
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    found = []
    for name, flags, world_size in (("one", [], 1), ("spread", sizes, ranks)):
        copy_checkpoint(start, tmp_path / name, STEPS)
        found.append(run(tmp_path / name, *OVER_RANKS[case], *flags, "--no-load-rng", world_size=world_size))
    one, spread = found
    if case == "exploring":
        read = [each["consumed samples"] for each in one.values()]
        assert 8 * LAST > read[-1] > 8 * LAST / STEPS
    assert list(one) == list(spread) == list(range(STEPS + 1, LAST + 1))
    for iteration, metrics in one.items():
        for key in ("consumed samples", "lm loss", "halt loss", "grad norm"):
            assert spread[iteration][key] == pytest.approx(metrics[key], rel=1e-5), (iteration, key)


def _said(flags: list[str]) -> str:
    import contextlib
    import io
    import sys

    from megatron_recursive.training.arguments import parse_arguments
    from megatron_recursive.training.memory_report import memory_of_run
    from megatron_recursive.training.model_provider import model_config_from_args
    from megatron_recursive.training.report import announce

    sys.argv = ["pretrain", *flags]
    args, recursion = parse_arguments()
    config = model_config_from_args(args, recursion)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        announce(args, config)
    states = (f"{stage.states:.0f}" for stage in memory_of_run(args, config))
    return f"{out.getvalue()}\nstates: {' '.join(states)}"


def test_the_plan_names_what_carried_states_need() -> None:
    wide = [*FLAGS, *RECURSION, "--hidden-size", "512", "--global-batch-size", "32"]
    (once,), (carried,) = (run_distributed(_said, 1, [*wide, *more]) for more in ([], CARRIED))
    size = 2 * 2 * 32 * 16 * 512 * 4  # where a step starts and what it leaves; output and latent
    assert f"carried states (output, latent: {size / 1e6:.1f} MB" in carried and "in a row, 16 passes" in carried
    assert int(carried.split()[-1]) - int(once.split()[-1]) == size
    (once, _), (carried, _) = (run_distributed(_said, 2, [*wide, *PP2, *more]) for more in ([], CARRIED))
    grown = [int(after) - int(before) for before, after in zip(once.split()[-2:], carried.split()[-2:], strict=True)]
    assert grown == [size, size // 4], "the last stage holds the outputs until the end of a step"


def test_what_a_recursion_that_is_off_leaves_unread_is_named() -> None:
    idle = "--recompute-passes --num-refinement-blocks 7 --state-norm none --halt-bias 0 --pipeline-phases two".split()
    (said,) = run_distributed(_said, 1, [*FLAGS, "--disable-recursive-refinement", *idle])
    (line,) = (line for line in said.splitlines() if "recursion is off" in line)
    assert line.startswith("recursion is off: --") and line.endswith(" do nothing")
    assert {*line[18:-11].split(", ")} == {each for each in idle if each.startswith("--")}
    (said,) = run_distributed(_said, 1, [*FLAGS, "--disable-recursive-refinement"])
    assert "recursion is off" not in said


def _held() -> list[list[int]]:
    import torch

    from megatron_recursive.training.supervision_steps import HeldBatch

    source = ({"tokens": torch.tensor([[2 * i], [2 * i + 1]])} for i in range(9))
    held, seen = HeldBatch(source, 2), []
    for replaced in ([[], []], [[], []], [[1], [0, 1]], [[], []], [[0], []]):
        held.replaced = replaced
        seen.append([int(v) for _ in range(2) for v in next(held)["tokens"]])
    return [*seen, [held.reads]]


def test_finished_samples_alone_are_replaced_in_the_order_of_the_data() -> None:
    (seen,) = run_distributed(_held, 1)
    assert seen == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 4, 5, 6], [0, 4, 5, 6], [7, 4, 5, 6], [4]]
