"""Distillation against the formula in plain torch: a Hugging Face donor's logits, top tokens of them, all layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import VOCAB, Case, Layout, build_wrapped, full_gradients, make_batches, run_schedule
from tests.unit_tests.hf.donors import make_donor
from tests.unit_tests.models.comparing import worst_error

KNOWN = VOCAB - 3  # rows of the student's padding
WEIGHT, TEMPERATURE = 0.7, 2.0
CASES = {
    "halting": Case(transformer={"num_layers": 2}),
    "gate": Case({"recursion_family": "looped", "num_refinement_blocks": 3, "exit_gate": True}),
    "deep supervision": Case({"halt_loss_weight": 0.0, "enable_deep_supervision": True,
                              "detach_between_refinements": False}),
    "documents": Case({"halt_loss_weight": 0.0}, documents=True, micro_batches=2),
    "untied": Case({"halt_loss_weight": 0.0, "detach_between_refinements": False}, micro_batches=6,
                                    model={"share_embeddings_and_output_weights": False}),
}  # fmt: skip
LAYOUTS = {
    "PP 2": (2, Layout(pp=2)),
    "TP 2, PP 2": (4, Layout(tp=2, pp=2)),
    "TP 2 with SP, DP 2": (4, Layout(tp=2, sequence_parallel=True)),
}
Result = tuple[dict[str, float], dict[str, Tensor]]


def _save(folder: Path) -> None:
    make_donor("llama3, head_dim", vocab_size=KNOWN).save_pretrained(folder / "llama")
    make_donor("qwen3", vocab_size=KNOWN).save_pretrained(folder / "qwen3")


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("donors")
    run_distributed(_save, 1, folder)
    return folder


def distilled(donor: Path, layout: Layout, evaluate: bool = False) -> dict[str, Result]:
    """Losses and gradients of one step of each case."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_recursive.training.distillation import DistillationSource

    found = {}
    for name, case in CASES.items():
        wrapped = build_wrapped(case, layout)
        model = unwrap_model(wrapped)
        if model.post_process:
            source = DistillationSource(str(donor), WEIGHT, TEMPERATURE)
            model.distillation = source.loaded(VOCAB, torch.float32, parallel_state.get_tensor_model_parallel_group())
        wrapped.zero_grad_buffer()
        losses = run_schedule(wrapped, case)
        gradients = full_gradients(wrapped)
        assert "distillation loss" not in run_schedule(wrapped, case, forward_only=True)
        found[name] = losses, gradients
    return found


def _against_formula(donor: Path) -> None:
    """The objective's gradient is that of the formula, in which teacher and softmaxes are whole and dense."""
    import transformers
    from megatron.core.utils import unwrap_model

    teacher = transformers.AutoModelForCausalLM.from_pretrained(donor).eval()
    teacher.resize_token_embeddings(VOCAB, mean_resizing=False)  # batches hold ids beyond the donor's
    teacher.get_input_embeddings().weight.data[KNOWN:] = 0.0
    found = distilled(donor, Layout())
    for name, case in CASES.items():
        wrapped = build_wrapped(case, Layout())
        model, masked = unwrap_model(wrapped), 0.0
        total: Any = 0.0
        pulled = 0.0
        for batch in make_batches(case, 0):
            mask = batch["loss_mask"]
            with torch.no_grad():
                places, documents = batch["position_ids"], batch["packed_seq_params"]
                if documents is not None:  # restarted positions tell transformers of documents, where it caches nothing
                    places = documents.places(len(places))
                logits = teacher(batch["input_ids"], position_ids=places, use_cache=False).logits
                q = (logits[..., :KNOWN] / TEMPERATURE).softmax(-1)
                q = torch.nn.functional.pad(q, (0, VOCAB - KNOWN))
            logits = model(batch["input_ids"], batch["position_ids"], None, packed_seq_params=documents)
            log_p = (logits / TEMPERATURE).log_softmax(-1)
            kl = TEMPERATURE**2 * (torch.xlogy(q, q) - q * log_p).sum(-1)
            output = model(**batch)
            halt = 0.0
            if model.plan.has_halting:  # the heads' loss is not shared
                plain = model(**batch).objective_BS
                lm = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
                halt, output.objective_BS = plain - lm, lm
            objective = (1 - WEIGHT) * output.objective_BS + WEIGHT * kl + halt
            total = total + (objective * mask).sum() / mask.sum() / case.micro_batches
            pulled, masked = pulled + float((kl.detach() * mask).sum()), masked + float(mask.sum())
        total.backward()
        losses, gradients = found[name]
        assert losses["distillation loss"] == pytest.approx(pulled / masked, rel=1e-5)
        mine = {n.removeprefix("module."): p.main_grad for n, p in wrapped.named_parameters()}
        assert set(mine) == set(gradients)
        assert worst_error(gradients, mine)[0] <= 1e-5, (name, worst_error(gradients, mine))


@pytest.mark.parametrize("kind", grid(["llama", "qwen3"], quick=["llama"]))
def test_the_objective_is_the_formulas(donors: Path, kind: str) -> None:
    run_distributed(_against_formula, 1, donors / kind, timeout=400)


@pytest.fixture(scope="module")
def serial(donors: Path) -> dict[str, Result]:
    return run_distributed(distilled, 1, donors / "llama", Layout(), timeout=400)[0]


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=["PP 2"]))
def test_layouts(donors: Path, serial: dict[str, Result], layout: str) -> None:
    ranks, how = LAYOUTS[layout]
    for rank in run_distributed(distilled, ranks, donors / "llama", how, timeout=400):
        for name, (losses, gradients) in rank.items():
            expected_losses, expected = serial[name]
            assert not losses or losses == pytest.approx(expected_losses, rel=1e-6, abs=1e-6)
            mine = {key: expected[key] for key in gradients}
            assert worst_error(gradients, mine)[0] <= 1e-6
