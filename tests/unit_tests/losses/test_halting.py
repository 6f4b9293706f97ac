"""The halting loss, the arg-max over a sharded vocabulary, and where a token would stop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_recursive.losses.halting import halting_loss, steps_until_halt
from tests.distributed import run_distributed
from tests.models import start_parallel

SEQ, BATCH, VOCAB = 5, 3, 12


def logits_with_ties() -> Tensor:
    """[S, B, V] of few different values, so that most maxima are shared, within a shard and across shards."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 3, (SEQ, BATCH, VOCAB), generator=generator).float()
    logits[0, 0] = 1.0  # all equal
    logits[0, 1] = -1.0
    logits[0, 1, VOCAB // 2 - 1 : VOCAB // 2 + 1] = 4.0  # the last of one shard and the first of the next
    logits[0, 2] = torch.arange(VOCAB).float()
    return logits


def lowest_of_the_best(logits_SBV: Tensor) -> Tensor:
    rows = [[row.index(max(row)) for row in batch] for batch in logits_SBV.tolist()]
    return torch.tensor(rows).T


def sharded_argmax(dtype: torch.dtype) -> Tensor:
    from megatron.core import parallel_state

    from megatron_recursive.losses.halting import vocab_parallel_argmax

    size = torch.distributed.get_world_size()
    start_parallel(size)
    group = parallel_state.get_tensor_model_parallel_group()
    return vocab_parallel_argmax(logits_with_ties().to(dtype).chunk(size, -1)[group.rank()], group)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_takes_the_lowest_id_among_equals_on_every_rank(world_size: int, dtype: torch.dtype) -> None:
    for ids_BS in run_distributed(sharded_argmax, world_size, dtype):
        assert torch.equal(ids_BS, lowest_of_the_best(logits_with_ties()))


def test_halting_loss_is_a_cross_entropy_per_token() -> None:
    logits = torch.tensor([[-3.0, 0.0, 2.0], [80.0, -80.0, 1.0]])
    should = torch.tensor([[True, False, True], [True, True, False]])
    loss = halting_loss(logits.bfloat16(), should)
    assert loss.shape == logits.shape and loss.dtype == torch.float32
    for got, q, halt in zip(loss.flatten(), logits.flatten().tolist(), should.flatten().tolist(), strict=True):
        expected = math.log1p(math.exp(-q if halt else q))
        assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_steps_until_halt_by_hand() -> None:
    halting = torch.tensor([  # [T=3, B=1, S=5]
        [[-1.0, 0.0, 2.0, -9.0, -9.0]],
        [[-1.0, 9.0, 2.0, 0.1, -9.0]],
        [[-1.0, 9.0, 2.0, -9.0, 5.0]],
    ])  # fmt: skip
    assert steps_until_halt(halting, 0.5).tolist() == [[3.0, 1.0, 1.0, 2.0, 3.0]]


def test_a_higher_threshold_refines_longer_and_the_input_stays_as_it_was() -> None:
    halting = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0))
    before = halting.clone()
    steps = [steps_until_halt(halting, threshold) for threshold in (0.1, 0.5, 0.9, 0.999)]
    assert torch.equal(halting, before)
    for shorter, longer in zip(steps, steps[1:], strict=False):
        assert (shorter <= longer).all() and shorter.mean() < longer.mean()
    assert steps[0].min() == 1 and steps[-1].max() == 4
