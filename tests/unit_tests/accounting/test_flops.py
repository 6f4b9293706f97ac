"""Counted FLOPs against torch's counter on a real training step."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_recursive.accounting import flops_per_token
from megatron_recursive.plan import RecursionConfig, build_plan
from tests.distributed import run_distributed
from tests.models import MICRO_BATCH, SEQ, Case, build_model, make_batches, start_parallel
from tests.unit_tests.accounting.test_params import shape_of
from tests.unit_tests.models.options import OPTIONS

FULL = {"detach_between_refinements": False}
LLAMA_LIKE = OPTIONS["rmsnorm-swiglu-untied-no-bias"]
RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
             "backprop_depth": 2}  # fmt: skip
CASES: dict[str, Case] = {
    "concat": Case({**RECURRENT, "injection": "concat", "state_norm": "core"}, transformer={"num_layers": 4}),
    "diagonal": Case({**RECURRENT, "injection": "diagonal"}, transformer={"num_layers": 4}),
    "gate": Case({**RECURRENT, "injection": "add", "boundary": "gate"}, transformer={"num_layers": 4}),
    "detach": Case(),
    "full": Case(recursion=FULL),
    "halting-last": Case(recursion={"halt_supervision": "last", "num_refinement_blocks": 3}),
    "no-halting": Case(recursion={"halt_loss_weight": 0.0}),
    "frozen": Case(FULL, None, LLAMA_LIKE.transformer, LLAMA_LIKE.model),
    "disabled": OPTIONS["disabled"],
    "llama-like-detach": LLAMA_LIKE,
    "llama-like-full": Case(FULL, None, LLAMA_LIKE.transformer, LLAMA_LIKE.model),
    "grouped-queries": OPTIONS["grouped-queries-qkv-bias"],
    "wide-heads": OPTIONS["qk-norm-layernorm-wide-heads"],
    "recurrent, two of four passes": Case(
        {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 4,
         "backprop_depth": 2, "injection": "add"}, transformer={"num_layers": 4},
    ),
}


def counted_by_torch() -> dict[str, tuple[int, int, int]]:
    """FLOPs of the forward pass, of the whole step, and of the passes without gradient, for one micro-batch.

    On the CPU the counter does not know torch's fused attention, so the attention is decomposed into the two matrix
    products that it does know. It counts both in full, hence ``causal=False`` below.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    start_parallel()
    counts = {}
    for name, case in CASES.items():
        model, batch = build_model(case), make_batches(case, 0)[0]
        if name == "frozen":  # what low-rank adapters leave of a backward: gradients of inputs
            model.requires_grad_(False)
            model.embedding.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            grad_free = [0]

            def counted_apart(part, grad_free=grad_free, counter=counter):
                def run(*args, **kwargs):
                    before = counter.get_total_flops()
                    result = part(*args, **kwargs)
                    grad_free[0] += 0 if torch.is_grad_enabled() else counter.get_total_flops() - before
                    return result

                return run

            for part in ("decode", "combine", "move"):
                setattr(model, part, counted_apart(getattr(model, part)))
            output = model.train()(**batch)
            forward = counter.get_total_flops()
            getattr(output, "objective_BS", output).sum().backward()
        counts[name] = (forward, counter.get_total_flops(), grad_free[0])
    return counts


@cache
def counted() -> dict[str, tuple[int, int, int]]:
    return run_distributed(counted_by_torch, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_flops_of_a_step(name: str) -> None:
    """1%: the halting head (2 H of a token's FLOPs) and the rotary tables are not counted."""
    case, tokens = CASES[name], MICRO_BATCH * SEQ
    plan, frozen = build_plan(case.resolved_recursion()), name == "frozen"
    flops = flops_per_token(shape_of(case), plan, causal=False, frozen=frozen)
    forward, total, grad_free = counted()[name]
    assert flops.forward == pytest.approx(forward / tokens, rel=0.01)
    assert flops.total == pytest.approx(total / tokens, rel=0.01)
    assert flops.grad_free_passes == pytest.approx(grad_free / tokens, rel=0.01)
    graded = total - grad_free - tokens * (flops.head_forward + flops.head_backward)
    assert flops.graded_passes == pytest.approx(graded / tokens, rel=0.01)


def test_gradient_free_passes_have_no_backward() -> None:
    shape = shape_of(Case())
    detached, full = (build_plan(Case(recursion=r).resolved_recursion()) for r in ({}, FULL))
    some, all_ = flops_per_token(shape, detached), flops_per_token(shape, full)
    assert some.passes_forward == all_.passes_forward
    assert all_.passes_backward == 2 * all_.passes_forward == 2 * some.passes_backward
    assert some.head_backward == some.head_forward  # two blocks are read, and one of them learns, at twice the cost


def test_causal_attention_counts_half_of_the_scores() -> None:
    shape, plan = shape_of(Case()), build_plan(RecursionConfig().resolved(embedding_init_std=0.02))
    saved = flops_per_token(shape, plan, causal=False).passes_forward - flops_per_token(shape, plan).passes_forward
    assert saved == plan.num_passes * shape.num_layers * 2 * shape.seq_length * shape.query_size
