"""Carried states: steps on one batch are those of the formula, and any layout is one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, Training, build_wrapped, full_gradients, run_schedule
from tests.unit_tests.models.comparing import worst_error

STEPS = 3
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000, "use_distributed_optimizer": True}
CASES = {
    "core": Case({"num_supervision_steps": STEPS}),
    "full": Case({"num_supervision_steps": STEPS, "detach_between_refinements": False, "halt_loss_weight": 0.0}),
    "sampled": Case({"recursion_family": "recurrent", "state_init": "sampled", "injection": "concat",
                     "num_recurrences": 2, "num_supervision_steps": STEPS}),
    "prelude, coda": Case({
        "recursion_family": "recurrent", "state_init": "sampled", "injection": "add", "num_recurrences": 2,
        "recurrence_step": "0.5", "num_prelude_layers": 1, "num_coda_layers": 1, "num_supervision_steps": STEPS,
    }, transformer={"num_layers": 4}),
    "coda behind": Case({
        "recursion_family": "recurrent", "state_init": "sampled", "injection": "concat", "num_recurrences": 2,
        "num_coda_layers": 1, "num_supervision_steps": STEPS,
    }, transformer={"num_layers": 3}),
}  # fmt: skip
LAYOUTS = {
    "pp2": (2, Layout(pp=2)),
    "tp2 pp2 sp, two phases": (4, Layout(tp=2, pp=2, sequence_parallel=True, phases="two", window=2)),
    "pp2 dp2, overlapped": (4, Layout(pp=2, ddp=OVERLAP)),
    "tp2 sp": (2, Layout(tp=2, sequence_parallel=True)),
    "pp2, passes replayed": (2, Layout(pp=2, recompute_passes=True)),
    "pp2, coda behind": (2, Layout(pp=2, stages={"num_layers_in_first_pipeline_stage": 2})),
}
# Tensor parallelism meets where states start (zeros or samples), not what runs between: each start on either layout.
PAIRS = [(layout, case) for layout in LAYOUTS for case in CASES
         if ("behind" in layout) == ("behind" in case) and "tp2" not in layout]
PAIRS += [("tp2 pp2 sp, two phases", "full"), ("tp2 pp2 sp, two phases", "prelude, coda"),
          ("tp2 sp", "core"), ("tp2 sp", "sampled")]  # fmt: skip
QUICK = [("tp2 sp", "sampled"), ("pp2 dp2, overlapped", "sampled")]
FRESH = (False, True)  # the second sample of each micro-batch starts anew at the last step


def on_carried_states(cases: dict[str, Case], layout: Layout) -> dict[str, list[Training]]:
    """Steps on one batch; of the last one, another sample in one slot; then one on the batch of another step."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_recursive.models.carried_states import CarriedStates

    found = {}
    for name, case in cases.items():
        wrapped, found[name] = build_wrapped(case, layout), []
        count = case.micro_batches // parallel_state.get_data_parallel_world_size()
        carried = unwrap_model(wrapped).carried_states = CarriedStates(count)
        for step in range(STEPS + 1):
            fresh = [torch.tensor(FRESH)] * count if step == STEPS - 1 else None
            carried.begin(fresh, anew=step in (0, STEPS))
            wrapped.zero_grad_buffer()
            metrics = run_schedule(wrapped, case, step=step // STEPS)
            found[name].append(Training([metrics], [full_gradients(wrapped)], [], {}))
            if step == 1:  # an evaluation between, and the step again, as Megatron's rerun state machine has it
                evaluation = run_schedule(wrapped, case, step=7, forward_only=True)
                found[name][-1].evaluations.append(evaluation)
                wrapped.zero_grad_buffer()
                found[name][-1].metrics.append(run_schedule(wrapped, case, step=0))
    return found


@cache
def alone() -> dict[str, list[Training]]:
    return run_distributed(on_carried_states, 1, CASES, Layout(), timeout=120)[0]


def by_hand(case: Case) -> list[float]:
    """The loss of each step, by the model's own plan run on states that are passed on by hand."""
    from tests.models import make_batches

    model = build_wrapped(case, Layout()).module
    batches, losses = make_batches(case, 0), []
    states = [dict[str, torch.Tensor]() for _ in batches]
    for _ in range(2):
        total, count = 0.0, 0.0
        for batch, carried in zip(batches, states, strict=True):
            state = model.initial_state(
                model.embed(batch["input_ids"], batch["position_ids"]), batch["input_ids"], batch["position_ids"]
            )
            state.values.update(carried)
            ends = dict[str, torch.Tensor]()
            for p in model.plan.passes:
                if p.stack == "coda":
                    ends["output"] = state.output
                state.update(p, model.decode(state.gather(p), None, stack=p.stack, closes=model.plan.closes(p)))
            carried.update({name: ends.get(name, state.values[name]).detach() for name in model.plan.carried})
            logits = model.logits_BSV(state.output).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
            total += float((loss * batch["loss_mask"].flatten()).sum())
            count += float(batch["loss_mask"].sum())
        losses.append(total / count)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_a_step_goes_on_where_the_one_before_ended(case: str) -> None:
    steps = alone()[case]
    expected = run_distributed(by_hand, 1, CASES[case], timeout=60)[0]
    assert [step.metrics[0]["lm loss"] for step in steps[:2]] == pytest.approx(expected, rel=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
    assert steps[1].metrics[0] == steps[1].metrics[1], "a step that runs again starts where it did"
    assert "output change block 1" not in steps[0].metrics[0]


@pytest.mark.parametrize(("layout", "case"), grid(PAIRS, QUICK))
def test_a_layout_is_one_process(layout: str, case: str) -> None:
    ranks, how = LAYOUTS[layout]
    found = run_distributed(on_carried_states, ranks, {case: CASES[case]}, how, timeout=120, rendezvous=30.0)
    tolerance = 5e-6 if how.tp > 1 else 1e-6
    for number, whole in enumerate(alone()[case]):
        for rank in found:
            gradients = rank[case][number].gradients[0]
            error, name = worst_error({**whole.gradients[0], **gradients}, whole.gradients[0])
            assert gradients and error <= tolerance, (number, name, error)
        for mine, expected in ((found[-1][case][number].metrics[0], whole.metrics[0]),
                               *zip(found[-1][case][number].evaluations, whole.evaluations, strict=True)):  # fmt: skip
            for metric, value in expected.items():
                assert mine[metric] == pytest.approx(value, rel=tolerance, abs=1e-7), (number, metric)
