"""A changed token moves nothing before it: no logit, no halting logit, no loss."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.models import SEQ, VOCAB, Case, build_model, make_batches, start_parallel

UNTIED = {"share_embeddings_and_output_weights": False}
TOKENS = (1, 7, SEQ - 1)
SECOND_DOCUMENT = SEQ // 3

# Every pair of values is there; of any three, every other one decides on documents.
CASES: dict[str, Case] = {
    f"{init}, {norm}, {positions}{', documents' if documents else ''}": Case(
        recursion={"state_init": init, "state_norm": norm},
        model={**UNTIED, "position_embedding_type": positions},
        documents=documents,
    )
    for init, norm, positions in itertools.product(
        ("zeros", "trunc-normal"), ("final", "none"), ("learned_absolute", "rope")
    )
    for documents in [(init == "zeros") ^ (norm == "final") ^ (positions == "rope")]
}
CASES["agrees with last"] = Case(recursion={"halt_target": "agrees-with-last", "detach_between_refinements": False})


def observe(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Everything that the model says about a position, [B, S, features]."""
    halting: list[Tensor] = []
    handle = model.halting_head.register_forward_hook(lambda _module, _args, q: halting.append(q.detach()))
    seen = []
    for train in (True, False):
        model.train(train)
        seen.append(model(**batch).objective_BS.detach()[..., None])
    handle.remove()
    assert len(halting) == 4, "two blocks in training, two in evaluation"
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in batch if name not in ("labels", "loss_mask")})
    return torch.cat([*seen, *(q[..., None] for q in halting), logits], -1)


def movements(case: Case) -> list[tuple[int, Tensor]]:
    """For every changed token, the largest difference of each feature at each position, [S, features]."""
    start_parallel()
    model, batch = build_model(case), make_batches(case, 0)[0]
    before, found = observe(model, batch), []
    for token in TOKENS:
        changed = batch["input_ids"].clone()
        changed[:, token] = (changed[:, token] + 17) % VOCAB
        after = observe(model, {**batch, "input_ids": changed})
        found.append((token, (after - before).abs().amax(0)))
    return found


def all_movements() -> dict[str, list[tuple[int, Tensor]]]:
    return {name: movements(case) for name, case in CASES.items()}


def test_nothing_before_a_changed_token_moves() -> None:
    for name, found in run_distributed(all_movements, 1)[0].items():
        for token, moved_SF in found:
            where = f"{name}: token {token}"
            # Exactly: a position's numbers are computed by the same kernels from the same inputs.
            assert not moved_SF[:token].any(), where
            assert (moved_SF[token] > 0).sum() > 0.9 * moved_SF.shape[1], where
            if not CASES[name].documents:
                assert (moved_SF[token:] > 0).any(1).all(), where
            elif token < SECOND_DOCUMENT:
                assert not moved_SF[SECOND_DOCUMENT:].any(), f"{where} is seen from the next document"
