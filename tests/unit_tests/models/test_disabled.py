"""With recursion disabled the model is Megatron's GPTModel, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.models import SEQ, VOCAB, Case, Layout, build_model, make_batches, start_parallel, transformer_config

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
CASES: dict[str, Case] = {
    "plain": Case(),
    "dropout": Case(transformer=DROPOUT),
    "llama-like": Case(
        transformer={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "num_query_groups": 2},
        model={"share_embeddings_and_output_weights": False},
    ),
    "learned-positions": Case(model={"position_embedding_type": "learned_absolute"}, transformer=DROPOUT),
    # Knobs that mean something only when recursion is on.
    "other-knobs": Case(
        recursion={"state_norm": "none", "state_init": "trunc-normal", "init_depth_scaling": "unrolled"}
    ),
}


def build_plain(case: Case, layout: Layout) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_recursive.models.layer_specs import local_block_spec

    config = transformer_config(case, layout)
    arguments = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": True, **case.model}
    return GPTModel(config, local_block_spec(config), VOCAB, SEQ, **arguments)


def build_disabled(case: Case, layout: Layout) -> Any:
    recursion = {**case.recursion, "enable_recursive_refinement": False}
    return build_model(Case(recursion, None, case.transformer, case.model), layout, known_weights=False)


def observe(build: Any, case: Case, layout: Layout) -> dict[str, Any]:
    """What a run of a fresh model gives: with the same seed, the same random numbers."""
    torch.manual_seed(7)
    start_parallel(layout.tp, seed=7)
    model = build(case, layout)
    batch = make_batches(case, 0)[0]
    with torch.no_grad():
        model.eval()
        logits = model(batch["input_ids"], batch["position_ids"], None)
        losses = model(batch["input_ids"], batch["position_ids"], None, labels=batch["labels"])
        model.train()
    trained = model(**batch)
    trained.sum().backward()
    return {
        "tensors": {"logits": logits, "losses": losses, "trained": trained},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "weights": {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)},
        "keys": list(model.state_dict()),
        "sharded keys": {name: value.key for name, value in model.sharded_state_dict().items()},
        "drops": bool((trained != losses).any()),
    }


def observe_all(layout: Layout) -> dict[str, tuple[dict[str, Any], ...]]:
    builders = (build_plain, build_disabled)
    return {name: tuple(observe(build, case, layout) for build in builders) for name, case in CASES.items()}


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True)], ids=["tp1", "tp2-sp"])
def test_disabled_recursion_is_megatrons_gpt(layout: Layout) -> None:
    for rank in run_distributed(observe_all, layout.tp, layout):
        for name, (plain, disabled) in rank.items():
            assert plain["keys"] == disabled["keys"], name
            assert plain["sharded keys"] == disabled["sharded keys"], name
            assert plain["drops"] == ("hidden_dropout" in CASES[name].transformer), name
            for what in ("tensors", "gradients", "weights"):
                assert list(plain[what]) == list(disabled[what]), name
                different = [key for key in plain[what] if not torch.equal(plain[what][key], disabled[what][key])]
                assert different == [], (name, what)
