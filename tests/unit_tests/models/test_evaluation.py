"""Evaluation and inference run the recursion too, and report every block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.models import Case, Layout, build_model, build_wrapped, make_batches, run_schedule, start_parallel

LAST = Case(recursion={"num_refinement_blocks": 3, "halt_supervision": "last"})
NO_HALTING = Case(recursion={"num_refinement_blocks": 3, "halt_loss_weight": 0.0, "state_norm": "none"})
BLOCKS = {f"lm loss block {block}" for block in (1, 2, 3)}


def reports(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    wrapped = build_wrapped(case, Layout())
    return run_schedule(wrapped, case), run_schedule(wrapped, case, forward_only=True)


@pytest.mark.parametrize("case", [LAST, NO_HALTING], ids=["halting-last", "no-halting"])
def test_evaluation_reports_every_block_and_the_training_losses(case: Case) -> None:
    trained, evaluated = run_distributed(reports, 1, case)[0]
    assert set(evaluated) - set(trained) == {"lm loss block 1", "lm loss block 2"}
    assert BLOCKS <= set(evaluated)
    assert {f"output change block {block}" for block in (1, 2, 3)} | {"token cosine"} <= set(evaluated)
    assert {name: evaluated[name] for name in trained} == trained
    assert len({evaluated[name] for name in BLOCKS}) == 3
    assert evaluated["lm loss"] == evaluated["lm loss block 3"]


def logits(layout: Layout) -> dict[str, Tensor]:
    from megatron.core.models.gpt.gpt_model import GPTModel

    start_parallel(layout.tp)
    case = Case(model={"share_embeddings_and_output_weights": False})
    model, batch = build_model(case, layout), make_batches(case, 0)[0]
    arguments: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    results = {}
    with torch.no_grad():
        for mode in ("train", "eval"):
            results[mode] = model.train(mode == "train")(**arguments, runtime_gather_output=True)
        single = GPTModel.forward(model, **arguments, runtime_gather_output=True)
        return {**results, "single pass": single, "losses": model(**arguments, labels=batch["labels"]).objective_BS}


def test_logits() -> None:
    serial = run_distributed(logits, 1, Layout())[0]
    assert serial["eval"].shape == (2, 16, 64)
    assert torch.equal(serial["eval"], serial["train"])
    assert not torch.allclose(serial["eval"], serial["single pass"], atol=0.1)
    for layout in (Layout(tp=2), Layout(tp=2, sequence_parallel=True)):
        for rank in run_distributed(logits, 2, layout):
            for name, expected in serial.items():
                torch.testing.assert_close(rank[name], expected, rtol=0, atol=2e-5)


def refused() -> str:
    start_parallel()
    case = Case()
    model, batch = build_model(case), make_batches(case, 0)[0]
    try:
        model(**batch, inference_context=object())
    except AssertionError as error:
        return str(error)
    return ""


def test_an_argument_that_the_recursion_would_ignore_is_refused() -> None:
    assert "inference_context" in run_distributed(refused, 1)[0]
