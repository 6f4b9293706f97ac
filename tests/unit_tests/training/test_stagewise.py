"""A plan run stage by stage, for samples and for the check at the start, is the plan in one process."""

from __future__ import annotations

import pytest

from tests.distributed import run_distributed
from tests.models import Case, Layout, build_wrapped, make_batches

# The first stage of two has the prelude alone, the last one core and coda; a mean step reads the state before it.
CASE = Case({"recursion_family": "recurrent", "num_prelude_layers": 2, "num_coda_layers": 1, "num_recurrences": 3,
             "recurrence_step": "mean"}, transformer={"num_layers": 4}, micro_batches=1)  # fmt: skip


def passes(stages: int) -> list[float]:
    """How far each pass turns what it reads, and the norm of the output."""
    import torch

    from megatron_recursive.training.stagewise import run_passes

    model = build_wrapped(CASE, Layout(pp=stages)).module
    (batch,) = make_batches(CASE, 0)
    found: list[float] = []
    with torch.no_grad():
        output = run_passes(model, batch["input_ids"], batch["position_ids"],
                            lambda _, read, result: found.append(float((result - read).norm())))  # fmt: skip
    return [*found, float(output.norm())]


def test_passes_over_stages_are_those_of_one_process() -> None:
    (expected,) = run_distributed(passes, 1, 1)
    assert len(expected) == 6 and min(expected) > 0.1
    for rank in run_distributed(passes, 2, 2):
        assert rank == pytest.approx(expected, rel=1e-5)
