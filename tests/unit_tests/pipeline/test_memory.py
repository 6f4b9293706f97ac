"""What a rank keeps of the hidden tensors that it receives."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import run_distributed
from tests.models import HIDDEN, MICRO_BATCH, SEQ, Case, Layout, build_wrapped, run_schedule

MICRO_BATCHES = 4
HEAVY = Case({"num_refinement_blocks": 7, "num_latent_refinements": 2}, micro_batches=MICRO_BATCHES)
FREE_PASSES = 18  # of 21


def peak_of_received(phases: str) -> int:
    """The most full-size hidden tensors alive at once, out of those that grad-free passes sent to this rank."""
    from megatron_recursive.pipeline.ring_schedule import RingStep

    seen: list[weakref.ref[Tensor]] = []
    peak = 0
    original = RingStep._answer

    def watched(step: Any, received: Tensor | None, decoder_pass: Any) -> Tensor | None:
        nonlocal peak
        kept = original(step, received, decoder_pass)
        sent_without_gradient = not decoder_pass.grad or (step.model.pre_process and decoder_pass.cuts_states)
        if received is not None and sent_without_gradient:
            seen.extend(weakref.ref(tensor) for tensor in (received, kept) if tensor is not None)
        alive = [tensor for tensor in (ref() for ref in seen) if tensor is not None]
        full = [tensor for tensor in alive if tensor.numel() == SEQ * MICRO_BATCH * HIDDEN]
        peak = max(peak, len({tensor.untyped_storage().data_ptr() for tensor in full}))
        return kept

    RingStep._answer = watched  # type: ignore[method-assign]
    try:
        wrapped = build_wrapped(HEAVY, Layout(pp=2, phases=phases))
        run_schedule(wrapped, HEAVY)
    finally:
        RingStep._answer = original  # type: ignore[method-assign]
    assert len(seen) >= FREE_PASSES * MICRO_BATCHES - MICRO_BATCHES, "the watch saw too little"
    return peak


@pytest.mark.parametrize("phases", ["one", "two"])
def test_grad_free_passes_leave_their_states_and_nothing_else(phases: str) -> None:
    """Stage 0 holds two states of each micro-batch, and the tensor that has just come; the last stage, only that one.

    Without the freeing it would be one tensor for each of the 18 grad-free passes of each micro-batch.
    """
    first, last = run_distributed(peak_of_received, 2, phases)
    assert first <= 2 * MICRO_BATCHES + 1
    assert last <= 2
