"""The simulated pipeline against known efficiencies, against its own dependencies, and against what Megatron ran."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest

from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.trips import trips_of
from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, build_wrapped, run_schedule

SHAPE = dict(num_layers=8, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=4,
             kv_channels=16, vocab_size=512, seq_length=32)  # fmt: skip


def plan_of(blocks: int, latents: int, *, detach: bool = False, **knobs: Any) -> RecursionPlan:
    config = RecursionConfig(num_refinement_blocks=blocks, num_latent_refinements=latents,
                             detach_between_refinements=detach, **knobs)  # fmt: skip
    return build_plan(config.resolved(embedding_init_std=0.02))


class Operation(NamedTuple):
    """One forward ("F") or backward ("B") of one pass of one micro-batch on a stage."""

    kind: str
    pass_index: int
    micro_batch: int


def schedule_order(
    stages: int, rank: int, passes: int, micro_batches: int, forward_only: bool = False, *, interleaved: bool = True
) -> list[Operation]:
    """The operations of a rank, in order. Grad-free passes have their backward slots too, without work in them."""
    from megatron_recursive.pipeline.timeline import forward_order, warm_up

    table = forward_order(stages, passes, micro_batches)
    forwards = [Operation("F", index, batch) for batch, index in table]
    if forward_only:
        return forwards
    backwards = [Operation("B", passes - 1 - index, batch) for batch, index in table]
    warm = warm_up(stages, rank, passes, micro_batches, interleaved=interleaved)
    pairs = [op for pair in zip(forwards[warm:], backwards, strict=False) for op in pair]
    return forwards[:warm] + pairs + backwards[len(forwards) - warm :]


def operations_of(timeline: Any, rank: int) -> list[tuple[float, float, Operation]]:
    """(start, end, operation) of a rank, in order."""
    found, begun, costs = [], Counter[int](), timeline.costs
    for phase in timeline.phases:
        backward = {(batch, phase.passes - 1 - index): at for at, (batch, index) in enumerate(phase.order)}
        forward = {entry: at for at, entry in enumerate(phase.order)}
        micro_batches = len(phase.order) // phase.passes
        for op in schedule_order(costs.stages, rank, phase.passes, micro_batches, phase.forward_only):
            kind, where = (0, forward) if op.kind == "F" else (1, backward)
            end = float(phase.ends[kind, where[op.micro_batch, op.pass_index], rank])
            op = op._replace(pass_index=op.pass_index + phase.first_pass,
                             micro_batch=op.micro_batch + begun[phase.first_pass])  # fmt: skip
            prices = costs.forward if op.kind == "F" else costs.backward
            found.append((end - prices[op.pass_index][rank], end, op))
        begun[phase.first_pass] += micro_batches
    return found


# --- arithmetic (in a worker, which has Megatron loaded) ------------------------------------------------------------


def _equal_passes() -> list[tuple[Any, ...]]:
    from megatron_recursive.pipeline.pass_costs import equal_costs
    from megatron_recursive.pipeline.timeline import simulate

    found = []
    for stages in (2, 3, 4, 8):
        for batches in (stages, stages + 1, 2 * stages, 2 * stages + 1, 4 * stages):
            for latents in (1, 2, 6, 20):
                timeline = simulate(equal_costs(plan_of(1, latents), stages), batches)
                found.append((stages, batches, latents + 1, timeline.efficiency, timeline.idle, timeline.peak_live))
    return found


def test_equal_passes_idle_three_slots_per_further_stage() -> None:
    """However many passes and micro-batches: forward 1 + backward 2 slots of 1 / P for each of the other P - 1 stages.
    """
    (found,) = run_distributed(_equal_passes, 1)
    for stages, batches, passes, efficiency, idle, peak in found:
        assert max(peak) <= passes * batches
        if batches % stages:
            assert efficiency > 0.5
            continue
        assert idle == pytest.approx([3.0 * (stages - 1) / stages] * stages)
        assert efficiency == pytest.approx(batches * passes / (batches * passes + stages - 1))
        assert peak[0] == min(2 * (stages - 1) + (passes - 1) * stages + 1, passes * batches) == max(peak)


def _peaks() -> list[tuple[Any, ...]]:
    """Simulated and closed, one and two phases, gradient at the end and anywhere, plain 1F1B."""
    from megatron_recursive.pipeline.pass_costs import PassCosts
    from megatron_recursive.pipeline.timeline import simulate
    from megatron_recursive.pipeline.windows import most_held, window_sizes

    plans = [(True, True), (True,) * 5, (False,) + (True,) * 4, (False,) * 4 + (True,) * 2, (False,) * 2 + (True,) * 5,
             (False, True, False, False, True, True)]  # fmt: skip
    found = []
    for stages in (2, 3, 5, 8):
        for batches in sorted({*range(stages, 2 * stages + 2), 3 * stages - 1, 5 * stages + 1}):
            for grad in plans:
                costs = PassCosts(((1.0,) * stages,) * len(grad), tuple((2.0 * g,) * stages for g in grad), grad)
                sizes = {window_sizes(stages, batches, stages), window_sizes(stages, batches)}
                for windows in ((), *([] if any(grad[:2]) else sizes)):
                    found.append((simulate(costs, batches, windows=windows).peak_live,
                                  [most_held(grad, stages, batches, windows, n, grad) for n in range(stages)]))
            once = PassCosts(((1.0,) * stages,), ((2.0,) * stages,), (True,))
            found.append((simulate(once, batches, interleaved=False).peak_live,
                          [most_held((True,), stages, batches, (), n, (True,)) for n in range(stages)]))  # fmt: skip
    return found


@pytest.mark.grid
def test_what_a_stage_holds_is_known_without_simulating() -> None:
    (found,) = run_distributed(_peaks, 1, timeout=120)
    assert len(found) > 200 and [simulated for simulated, _ in found] == [closed for _, closed in found]


def _references() -> dict[str, float]:
    from megatron_recursive.pipeline.planner import plan_pipeline

    timeline, report = plan_pipeline(plan_of(1, 6), 4, 8)
    assert timeline.efficiency == report["schedules"]["ring, one phase"]["efficiency"]
    return {name: one["efficiency"] for name, one in report["schedules"].items()}


def test_the_alternatives() -> None:
    (found,) = run_distributed(_references, 1)
    assert found == pytest.approx({
        "ring, one phase": 56 / 59, "naive ring": 1 / 4, "plain 1F1B, layers passed once": 8 / 11
    })  # fmt: skip


def _check_grid() -> int:
    """Every operation once and in Megatron's order, none before its input; unequal passes, one and two phases."""
    from megatron_recursive.accounting import ModelShape
    from megatron_recursive.pipeline.pass_costs import price_passes
    from megatron_recursive.pipeline.timeline import simulate
    from megatron_recursive.pipeline.windows import window_sizes

    shape, seen = ModelShape(**SHAPE), 0
    for stages, batches in ((2, 2), (2, 5), (3, 4), (4, 4), (4, 7), (4, 9), (5, 13)):
        for blocks, latents, detach in ((1, 1, False), (2, 1, True), (3, 2, True), (2, 3, False)):
            plan = plan_of(blocks, latents, detach=detach)
            costs = price_passes(plan, shape, [8 - stages + 1] + [1] * (stages - 1))
            free = plan.grad_passes[0].index
            for windows in {(), window_sizes(stages, batches, stages), (batches,)} if free else {()}:
                timeline = simulate(costs, batches, windows=windows)
                by_rank = [operations_of(timeline, rank) for rank in range(stages)]
                ends = {(op, rank): end for rank, ops in enumerate(by_rank) for _, end, op in ops}
                free = plan.grad_passes[0].index if windows else 0
                assert len(ends) == stages * batches * (2 * plan.num_passes - free)
                for rank, ops in enumerate(by_rank):
                    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(ops, ops[1:], strict=False))
                    for start, _, op in ops:
                        needed = _input_of(op, rank, stages, plan.num_passes)
                        assert needed is None or ends[needed] <= start + 1e-9
                if not windows:
                    order = schedule_order(stages, 1, plan.num_passes, batches)
                    assert [op for *_, op in by_rank[1]] == order
                seen += 1
    return seen


def _input_of(op: Any, rank: int, stages: int, passes: int) -> Any:
    """The operation whose result an operation needs, written down again from the definition of the ring."""
    if op.kind == "F":
        if rank == 0:
            return (op._replace(pass_index=op.pass_index - 1), stages - 1) if op.pass_index else None
        return op, rank - 1
    if rank < stages - 1:
        return op, rank + 1
    last = op.pass_index == passes - 1
    return (op._replace(kind="F"), rank) if last else (op._replace(pass_index=op.pass_index + 1), 0)


def test_nothing_starts_before_its_input() -> None:
    assert run_distributed(_check_grid, 1, timeout=120) == [48]


def _prices() -> dict[str, Any]:
    from megatron_recursive.accounting import ModelShape, flops_per_token
    from megatron_recursive.accounting.flops import layer_forward_flops
    from megatron_recursive.pipeline.pass_costs import price_passes
    from megatron_recursive.pipeline.timeline import simulate

    shape, plan, ratios = ModelShape(**SHAPE), plan_of(3, 2, detach=True), []
    for split in ((4, 4), (5, 3), (1, 2, 5)):
        unit = 8 * layer_forward_flops(shape)
        ratios.append(sum(price_passes(plan, shape, split).busy(1)) * unit / flops_per_token(shape, plan).total)
    both = {two: simulate(price_passes(plan, shape, (2,) * 4), 8, windows=(8,) * two) for two in (False, True)}
    return {"ratios": ratios, "makespans": [both[two].makespan for two in (False, True)]}


def test_prices_add_up_to_the_flops_of_accounting_and_two_phases_are_faster() -> None:
    (found,) = run_distributed(_prices, 1)
    assert found["ratios"] == pytest.approx([1.0] * 3)
    one, two = found["makespans"]
    assert two < one


def _large() -> tuple[float, float]:
    import time

    from megatron_recursive.pipeline.pass_costs import equal_costs
    from megatron_recursive.pipeline.timeline import simulate

    start = time.perf_counter()
    timeline = simulate(equal_costs(plan_of(3, 2), 512), 512)
    return timeline.efficiency, time.perf_counter() - start


@pytest.mark.grid
def test_hundreds_of_stages_take_seconds() -> None:
    ((efficiency, seconds),) = run_distributed(_large, 1, timeout=120)
    assert efficiency == pytest.approx(512 * 9 / (512 * 9 + 511))
    assert seconds < 40  # 2 on an idle core


# --- a real run -----------------------------------------------------------------------------------------------------


def _recorded(case: Case, layout: Layout) -> tuple[list[tuple[str, int, int]], list[Any], dict[int, set[bool]]]:
    """What Megatron's schedule did on this rank, what the simulation says, and which passes had work backward.

    An operation is recorded where the schedule calls ``forward_step`` and ``backward_step``; the latter is known by the
    very tensor that the former returned. Backward slots of grad-free passes are called, and compared, like the others;
    they hold a tensor without a graph.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from megatron_recursive.pipeline.pass_costs import equal_costs
    from megatron_recursive.pipeline.planner import chosen_windows

    operations: list[tuple[str, int, int]] = []
    outputs: list[tuple[Any, int, int]] = []
    works: dict[int, set[bool]] = {}
    forward, backward = schedules.forward_step, schedules.backward_step

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        view = args[2]
        outputs.append((result[0], view.trip.index, view.micro_batch))
        operations.append(("F", view.trip.index, view.micro_batch))
        return result

    def backward_step(received: Any, output: Any, *args: Any) -> Any:
        ((index, batch),) = [(index, batch) for tensor, index, batch in outputs if tensor is output]
        operations.append(("B", index, batch))
        works.setdefault(index, set()).add(output.requires_grad)
        return backward(received, output, *args)

    wrapped = build_wrapped(case, layout)
    schedules.forward_step, schedules.backward_step = forward_step, backward_step
    try:
        run_schedule(wrapped, case)
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward
    plan, layers = build_plan(case.resolved_recursion()), wrapped.config.num_layers // layout.pp
    rank, expected = parallel_state.get_pipeline_model_parallel_rank(), []
    costs = equal_costs(plan, layout.pp, layers_per_stage=(layers,) * layout.pp)
    windows = chosen_windows(costs, case.micro_batches, layout.phases, layout.window)
    split = plan.grad_passes[0].index if windows else 0
    for size in windows or (case.micro_batches,):  # a window counts its micro-batches from 0
        expected += schedule_order(layout.pp, rank, split, size, forward_only=True) if split else []
        for op in schedule_order(layout.pp, rank, len(costs.grad) - split, size, interleaved=len(costs.grad) > 1):
            expected.append(op._replace(pass_index=op.pass_index + split))
    return operations, expected, works


FULL = {"detach_between_refinements": False}
FOUR_LAYERS = {"num_layers": 4}
RUNS = {
    "full, 2 stages": (Case(recursion=FULL), Layout(pp=2, phases="one")),
    "full, 2 stages, ragged": (Case(recursion=FULL, micro_batches=5), Layout(pp=2, phases="one")),
    "detached, 2 stages": (Case(), Layout(pp=2, phases="one")),
    "detached, 2 stages, two phases": (Case(micro_batches=5), Layout(pp=2, phases="two", window=2)),
    "windows in blocks, 2 stages, two phases": (
        Case({"recursion_family": "hierarchical", "num_latent_refinements": 3, "latent_backprop_depth": "2"},
             transformer=FOUR_LAYERS, micro_batches=4), Layout(pp=2, phases="two")),
    "prelude and coda, 2 stages": (Case(
        {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
         "injection": "add", "backprop_depth": 1}, transformer=FOUR_LAYERS), Layout(pp=2)),
    "detached, 4 stages": (Case(transformer=FOUR_LAYERS, micro_batches=6), Layout(pp=4, phases="one")),
    "detached, 4 stages, two phases": (Case(transformer=FOUR_LAYERS, micro_batches=8), Layout(pp=4, phases="two")),
}


@pytest.mark.parametrize("name", grid(RUNS, quick=["full, 2 stages, ragged", "detached, 2 stages, two phases",
                                                     "prelude and coda, 2 stages"]))
def test_megatron_runs_in_the_simulated_order(name: str) -> None:
    case, layout = RUNS[name]
    plan = build_plan(case.resolved_recursion())
    first_answered = plan.grad_passes[0].index if layout.phases == "two" else 0
    trips = trips_of(plan, (case.transformer.get("num_layers", 2) // layout.pp,) * layout.pp)
    ranks = run_distributed(_recorded, layout.pp, case, layout, timeout=180)
    for rank, (operations, expected, works) in enumerate(ranks):
        assert operations == [tuple(op) for op in expected]
        assert works == {trip.index: {trip.around.grad or (rank == 0 and trip.grad)} for trip in trips[first_answered:]}


# --- what is planned with it ----------------------------------------------------------------------------------------


def _planned() -> dict[str, Any]:
    from megatron_recursive.accounting import ModelShape
    from megatron_recursive.errors import UserError
    from megatron_recursive.pipeline.pass_costs import equal_costs, price_passes
    from megatron_recursive.pipeline.planner import (
        chosen_windows,
        messages,
        plan_pipeline,
        said_of_phases,
        simulated_step,
    )
    from megatron_recursive.plots.pipeline_timeline import described

    shape, plain = ModelShape(**SHAPE), RecursionConfig(enable_recursive_refinement=False)
    windows = build_plan(RecursionConfig(recursion_family="hierarchical", num_refinement_blocks=2,
        num_latent_refinements=3, latent_backprop_depth="2").resolved(embedding_init_std=0.02))  # fmt: skip
    steps = []
    for stages, batches, detach in ((2, 16, True), (4, 24, False), (4, 23, True), (8, 40, True)):
        deep = plan_of(2, 2, detach=detach)
        timeline, _ = plan_pipeline(deep, stages, batches, shape)
        step = simulated_step(price_passes(deep, shape, (8 // stages,) * stages), batches)
        steps.append(((timeline.makespan, timeline.efficiency), (step.makespan, step.efficiency)))
    plan = plan_of(2, 1, detach=True)
    timeline, report = plan_pipeline(plan, 2, 8)
    said = []
    for refused, stages in ((plan, 1), (build_plan(plain.resolved(embedding_init_std=0.02)), 4)):
        try:
            plan_pipeline(refused, stages, 4)
        except UserError as error:
            said.append(str(error))
    deep = plan_of(3, 2, detach=True)
    try:
        chosen_windows(equal_costs(deep, 4), 64, window=3)
    except UserError as error:
        said.append(str(error))
    phases = {kind: said_of_phases(equal_costs(deep, 4), batches, kind)
              for kind, batches in (("auto", 64), ("one", 64), ("two", 37))}  # fmt: skip
    text = described(timeline, plan, report)
    return {"phases": phases, "steps": steps, "text": text, "refusals": said,
            "messages": messages(plan, trips_of(plan), 1, two_phases=False),
            "zero answers": [messages(windows, trips_of(windows), 1, two_phases=each)["neighbours"]["zero answers"]
                             for each in (True, False)],
            }  # fmt: skip


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    (found,) = run_distributed(_planned, 1)
    return found


def test_a_step_of_many_micro_batches_is_told_from_a_few_groups(planned: dict[str, Any]) -> None:
    for simulated, told in planned["steps"]:
        assert told == pytest.approx(simulated, rel=1e-4)


def test_a_timeline_in_letters(planned: dict[str, Any]) -> None:
    assert "ring, two phases" in planned["text"]
    assert "rank 1   .aabbaabbaabbaabb.ccdDDdDDcCCcCCdDDdDDcCCcCCdDDdDDcCCcCCdDDdDDCCCC.." in planned["text"]


def test_messages_and_refusals(planned: dict[str, Any]) -> None:
    assert planned["messages"] == {
        "neighbours": {"forward": 4, "backward": 4, "zero answers": 2},
        "last to first": {"forward": 3, "backward": 3, "zero answers": 2},
    }
    assert planned["zero answers"] == [1, 3]  # of a hierarchy whose gradient has a window in each block
    *timeline, window = planned["refusals"]
    assert len(timeline) == 2 and all("--timeline" in said for said in timeline)
    assert "--pipeline-window 3 is less than --pipeline-model-parallel-size 4" in window


def test_a_run_says_which_phases_it_takes_and_why(planned: dict[str, Any]) -> None:
    """Two phases idle 4.8% in windows of four micro-batches a stage, where one phase idles 6.7%."""
    both = "one phase 0.933 efficient, two 0.952)"
    assert planned["phases"] == {
        "auto": f"two phases in 4 windows of up to 16 micro-batches (the faster by simulation: {both}",
        "one": f"one phase (--pipeline-phases one: {both}",
        "two": planned["phases"]["two"],
    }
    assert planned["phases"]["two"].startswith("two phases in 3 windows of up to 13 micro-batches (--pipeline-phases")
