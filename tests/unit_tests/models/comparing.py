"""How far two results are apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest absolute expected value (or ``floor``, if that is larger)."""
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = max(float(expected.abs().max()), floor, torch.finfo(torch.float32).tiny)
    return float((actual.double() - expected.double()).abs().max()) / scale


def worst_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over named tensors, and whose it is. Both must have the same names.

    Each tensor is measured by its own scale, but by no less than 1e-4 of the largest one: a key's bias, say, has a
    gradient of exactly zero in theory and of rounding errors in practice.
    """
    assert set(actual) == set(expected), set(actual) ^ set(expected)
    floor = 1e-4 * max(float(tensor.abs().max()) for tensor in expected.values())
    return max((relative_error(actual[name], expected[name], floor), name) for name in expected)
