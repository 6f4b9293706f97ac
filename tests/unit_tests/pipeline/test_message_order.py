"""Messages that would hang under NCCL, whose sends may wait for their receives (``tests/rendezvous.py``).

The grid of ``test_ring.py`` runs in this mode too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import distributed
from tests.distributed import DistributedFailure, run_distributed
from tests.grids import grid
from tests.models import Case, Layout, build_wrapped, run_schedule

# --- the mode itself ------------------------------------------------------------------------------------------------


def exchanged() -> list[float]:
    """In matched pairs: even ranks send first, odd ones receive first."""
    mine, theirs, peer = torch.full((3,), float(dist.get_rank())), torch.empty(3), 1 - dist.get_rank()
    if dist.get_rank() == 0:
        dist.isend(mine, peer).wait()
        dist.irecv(theirs, peer).wait()
    else:
        received = dist.irecv(theirs, peer)
        dist.isend(mine, peer)  # behind the receive, which runs
        received.wait()
    return theirs.tolist()


def both_send_first() -> None:
    dist.isend(torch.zeros(1), 1 - dist.get_rank())
    dist.recv(torch.zeros(1), 1 - dist.get_rank())


def received_too_late() -> None:
    """Rank 1 sends what rank 0 receives only after a message of another group: gloo's buffers hide it."""
    other = dist.new_group([0, 1])
    for group in (dist.group.WORLD, other):  # the pair has met in both
        dist.send(torch.zeros(1), 1, group) if dist.get_rank() == 0 else dist.recv(torch.zeros(1), 0, group)
    if dist.get_rank() == 1:
        early = dist.isend(torch.ones(1), 0, other)
        dist.send(torch.ones(1), 0)
        early.wait()
    else:
        dist.recv(torch.empty(1), 1)
        dist.recv(torch.empty(1), 1, other)


@pytest.mark.grid  # the harness alone, and it waits for time-outs
def test_pairs_pass_and_late_receives_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE", 1.0)
    assert run_distributed(exchanged, 2, rendezvous=20.0) == [[1.0] * 3, [0.0] * 3]
    run_distributed(received_too_late, 2, timeout=20)
    for hanging in (both_send_first, received_too_late):
        with pytest.raises(DistributedFailure, match=r"rank \d: message \d, a \w+, with rank \d in group"):
            run_distributed(hanging, 2, rendezvous=1.0)


# --- calibration: Megatron's own schedule ---------------------------------------------------------------------------


def plain_gpt_step(stages: int, overlap_warm_up: bool, micro_batches: int, group: int) -> int:
    """A step of Megatron's interleaved schedule with two chunks of a plain GPT a stage; the losses that it reports."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_with_interleaving
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_recursive.models.layer_specs import local_block_spec
    from tests.models import SEQ, VOCAB, Case, Layout, make_batches, transformer_config

    parallel_state.initialize_model_parallel(1, stages, virtual_pipeline_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    chunked = {"num_layers": 2 * stages, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True,
               "batch_p2p_comm": False, "overlap_p2p_comm_warmup_flush": overlap_warm_up,
               "microbatch_group_size_per_vp_stage": group}  # fmt: skip
    case = Case(transformer=chunked, micro_batches=micro_batches)
    config, rank = transformer_config(case, Layout(pp=stages)), parallel_state.get_pipeline_model_parallel_rank()
    chunks = [
        GPTModel(
            config, local_block_spec(config, chunk), VOCAB, SEQ, position_embedding_type="rope", vp_stage=chunk,
            pre_process=rank == chunk == 0, post_process=rank == stages - 1 and chunk == 1,
        )
        for chunk in range(2)
    ]  # fmt: skip
    batches = make_batches(case, 0)
    for each in batches:
        del each["loss_mask"]
    reports = forward_backward_pipelining_with_interleaving(
        forward_step_func=plain_forward_step, data_iterator=[iter(batches), iter(batches)], model=chunks,
        num_microbatches=micro_batches, seq_length=SEQ, micro_batch_size=2,
    )  # fmt: skip
    assert all(p.grad is not None for chunk in chunks for p in chunk.decoder.parameters())
    return len(reports)


def plain_forward_step(batches: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
    output = model(**next(batches))
    return output, lambda out: (out.mean(), {"lm loss": out.detach().mean()})


CALIBRATION = [
    (stages, overlap, batches, group)
    for stages in (2, 3, 4)
    for overlap in (False, True)
    for batches, group in ((stages, stages), (3 * stages, stages), (2 * stages + 2, stages + 1))
]


@pytest.mark.parametrize(
    ("stages", "overlap", "batches", "group"), grid(CALIBRATION, quick=[(2, False, 6, 2), (3, True, 9, 3)])
)
def test_megatrons_own_schedule_passes(stages: int, overlap: bool, batches: int, group: int) -> None:
    reported = run_distributed(plain_gpt_step, stages, stages, overlap, batches, group, rendezvous=20.0)
    assert reported == [0] * (stages - 1) + [batches]


# --- groups of the caller -------------------------------------------------------------------------------------------


def groups_used() -> tuple[set[str], set[str], str]:
    """The groups of all messages of a two-phase step that is given another pipeline group, those that may be, and what
    is said to a communicator without groups."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_recursive.pipeline.ring_schedule import ring_forward_backward
    from tests.models import MICRO_BATCH, SEQ, Case, Layout, build_wrapped, forward_step, make_batches

    case = Case()
    wrapped, own = build_wrapped(case, Layout(pp=2, phases="two")), dist.new_group([0, 1])
    collection = schedules._build_default_pg_collection()
    collection.pp = own
    used, isend = set(), dist.isend

    def recorded(tensor: Any, dst: int, group: Any = None) -> Any:
        used.add((group or dist.group.WORLD).group_name)
        return isend(tensor, dst, group)

    def step(**groups: Any) -> None:
        ring_forward_backward(
            forward_step_func=forward_step, data_iterator=iter(make_batches(case, 0)), model=[wrapped],
            num_microbatches=case.micro_batches, seq_length=SEQ, micro_batch_size=MICRO_BATCH, **groups,
        )  # fmt: skip

    communicator, dist.isend = P2PCommunicator(own, wrapped.config), recorded
    try:
        step(p2p_communicator=communicator, pg_collection=collection)
    finally:
        dist.isend = isend
    try:
        step(p2p_communicator=communicator)
    except ValueError as error:
        return used, {own.group_name, dist.group.WORLD.group_name}, str(error)
    return used, set(), ""


def test_the_groups_of_the_caller_are_taken() -> None:
    for used, allowed, said in run_distributed(groups_used, 2, rendezvous=20.0):
        assert used and used <= allowed and "the same pp group" in said


def events(case: Case, layout: Layout, forward_only: bool) -> list[str]:
    """What this rank does in a step: posts a receive or a numbered send, waits for a send, begins a pass."""
    from megatron_recursive.pipeline import ring_schedule

    seen: list[str] = []
    isend, irecv, run_trip = torch.distributed.isend, torch.distributed.irecv, ring_schedule.RingStep.run_trip

    class Sent:
        def __init__(self, work: Any) -> None:
            self.work, self.number = work, sum(each.startswith("send") for each in seen)
            seen.append(f"send {self.number}")

        def wait(self) -> None:
            seen.append(f"wait {self.number}")
            self.work.wait()

    def noting(what: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(what)
            return call(*args, **kwargs)

        return noted

    wrapped = build_wrapped(case, layout)
    torch.distributed.isend = lambda *args, **kwargs: Sent(isend(*args, **kwargs))
    torch.distributed.irecv = noting("receive", irecv)
    ring_schedule.RingStep.run_trip = noting("pass", run_trip)  # type: ignore[method-assign]
    try:
        run_schedule(wrapped, case, forward_only=forward_only)
    finally:
        torch.distributed.isend, torch.distributed.irecv = isend, irecv
        ring_schedule.RingStep.run_trip = run_trip  # type: ignore[method-assign]
    return seen


def test_receives_are_posted_ahead_and_what_an_evaluation_sends_is_waited_for_a_pass_later() -> None:
    case = Case({"detach_between_refinements": False}, micro_batches=4)
    training = run_distributed(events, 2, case, Layout(pp=2), False)
    assert training[1][:3] == ["receive", "receive", "pass"]
    for rank in run_distributed(events, 2, case, Layout(pp=2), True):
        sends = sum(each.startswith("send") for each in rank)
        meanwhile = [rank[rank.index(f"send {n}") : rank.index(f"wait {n}")] for n in range(sends)]
        assert sends >= 20 and all("pass" in each for each in meanwhile[:-1])
