"""Our optimizers against their formulas, a step at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, atan2

from megatron_recursive.optimizers.adam_variants import AdamATan2, ELLISAdam

RATES, PEAK, DECAY, BETAS = (0.01, 0.02, 0.015, 0.0), 0.02, 0.1, (0.9, 0.95)


def adam_atan2(p: Tensor, gradients: list[Tensor]) -> Tensor:
    m, v, (b1, b2) = torch.zeros_like(p), torch.zeros_like(p), BETAS
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p * (1 - lr * DECAY) - lr * atan2(m / (1 - b1**t), (v / (1 - b2**t)).sqrt())
    return p


def ellis_adam(p: Tensor, gradients: list[Tensor]) -> Tensor:
    m, v, (b1, b2) = gradients[0], gradients[0] ** 2, BETAS
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        lr_clipped = lr / max(1, (g**2 / v).mean().sqrt()) / (1 - b1**t)
        p = p * (1 - lr / PEAK * DECAY) - lr_clipped * atan2(m, (v / (1 - b2**t)).sqrt())
    return p


@pytest.mark.parametrize(("kind", "formula"), [(AdamATan2, adam_atan2), (ELLISAdam, ellis_adam)])
def test_it_is_its_formula(kind: type[torch.optim.Optimizer], formula: object) -> None:
    """The last gradients are much larger than those before, so that ELLISAdam's steps are clipped."""
    drawn = torch.Generator().manual_seed(1)
    start = torch.randn(5, 3, generator=drawn, dtype=torch.float64)
    gradients = [torch.randn(5, 3, generator=drawn, dtype=torch.float64) * scale for scale in (1.0, 0.3, 9.0, 1.0)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = kind([{"params": [weight], "max_lr": PEAK}], lr=PEAK, betas=BETAS, weight_decay=DECAY)  # type: ignore[call-arg]
    for gradient, rate in zip(gradients, RATES, strict=True):
        weight.grad, optimizer.param_groups[0]["lr"] = gradient.clone(), rate
        optimizer.step()
    torch.testing.assert_close(weight.data, formula(start, gradients), rtol=1e-12, atol=1e-12)  # type: ignore[operator]


def test_a_first_step_of_ellis_adam_is_large_and_v_has_a_floor() -> None:
    """Its moments are whole from the start, and their bias is corrected as if they were not."""
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([1.0, -1.0, 1e-9, 0.0])
    optimizer = ELLISAdam([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-6)
    optimizer.step()
    expected = 10 * atan2(torch.tensor(1.0), torch.tensor(1 / (1 - 0.95) ** 0.5))
    assert weight.data[:2].tolist() == pytest.approx([-float(expected), float(expected)])
    assert optimizer.state[weight]["exp_avg_sq"].min() == pytest.approx(1e-12)
