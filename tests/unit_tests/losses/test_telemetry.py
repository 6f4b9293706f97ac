"""The measures of the states against brute force, whole and sharded over the sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_recursive.losses.telemetry import masked, relative_change, token_cosine
from tests.distributed import run_distributed
from tests.models import start_parallel

SEQ, BATCH, HIDDEN = 8, 3, 16


def make_states() -> tuple[Tensor, Tensor, Tensor]:
    """Two states [S, B, H] whose tokens have something in common, and a mask [S, B]; one sequence keeps one token."""
    generator = torch.Generator().manual_seed(2)
    before, after = torch.randn(2, SEQ, BATCH, HIDDEN, generator=generator) + 0.7
    mask = (torch.rand(SEQ, BATCH, generator=generator) > 0.3).float()
    mask[:, 1] = 0.0
    mask[3, 1] = 1.0
    return before, after, mask


def mean_cosine(state_SBH: Tensor, mask_SB: Tensor) -> list[float]:
    """For every sequence with two tokens or more, the mean over its pairs."""
    means = []
    for batch in range(state_SBH.shape[1]):
        kept = [state_SBH[s, batch] for s in range(state_SBH.shape[0]) if mask_SB[s, batch]]
        pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(kept, 2)]
        if pairs:
            means.append(max(0.0, sum(pairs) / len(pairs)))
    return means


def test_token_cosine_is_the_mean_over_pairs() -> None:
    _, after, mask = make_states()
    total, count = token_cosine(after, mask, None).tolist()
    expected = mean_cosine(after, mask)
    assert count == len(expected) == 2
    assert total == pytest.approx(sum(expected), rel=1e-5)


def test_token_cosine_of_equal_tokens_is_one_and_of_opposite_ones_is_zero() -> None:
    ones, mask = torch.ones(4, 1, 8), torch.ones(4, 1)
    assert token_cosine(ones, mask, None).tolist() == pytest.approx([1.0, 1.0])
    ones[::2] *= -1
    assert token_cosine(ones, mask, None).tolist() == [0.0, 1.0]


def test_relative_change_is_a_mean_over_tokens() -> None:
    before, after, mask = make_states()
    ratios = [
        ((after[place] - before[place]).norm() / after[place].norm()).item()
        for place in itertools.product(range(SEQ), range(BATCH))
        if mask[place]
    ]
    assert relative_change(before, after, mask, None).tolist() == pytest.approx([sum(ratios), len(ratios)], rel=1e-5)


def test_nothing_is_divided_by_zero() -> None:
    zero, none = torch.zeros(SEQ, BATCH, HIDDEN), torch.zeros(SEQ, BATCH)
    assert relative_change(zero, zero, torch.ones(SEQ, BATCH), None).tolist() == [0.0, SEQ * BATCH]
    assert token_cosine(zero, none, None).tolist() == [0.0, 0.0]
    assert masked(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [3.0, 3.0]


def of_a_shard() -> tuple[Tensor, Tensor]:
    from megatron.core import parallel_state

    start_parallel(2)
    group = parallel_state.get_tensor_model_parallel_group()
    before, after, mask = (tensor.chunk(2)[group.rank()] for tensor in make_states())
    return relative_change(before, after, mask, group), token_cosine(after, mask, group)


def test_shards_of_a_sequence_give_the_whole() -> None:
    before, after, mask = make_states()
    for change, cosine in run_distributed(of_a_shard, 2):
        torch.testing.assert_close(change, relative_change(before, after, mask, None))
        torch.testing.assert_close(cosine, token_cosine(after, mask, None))
