"""What each layer does to the stream that it reads, from one pass over text.

Block influence is 1 - the mean cosine of a layer's input and output (ShortGPT, arXiv 2403.03853), angular distance the
mean of arccos(cosine) / pi (Gromov et al., arXiv 2403.17887). The output is taken from the layer itself: the last
hidden state that transformers returns has been through the final norm.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerScores:
    """By layer, over all tokens and passes; ``applied`` says how often a token goes through each."""

    influence: list[float]
    distance: list[float]
    applied: list[int]


def angles(before: Tensor, after: Tensor) -> Tensor:
    """Radians between two vectors of each token. Near 0 and pi arccos would magnify a cosine's rounding."""
    u, v = (F.normalize(each.float(), dim=-1) for each in (before, after))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)).double()


def score_layers(layers: Sequence[nn.Module], run: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> LayerScores:
    """``run`` is given batches of token ids [B, S], and calls every layer."""
    sums, tokens = torch.zeros(len(layers), 3, dtype=torch.float64), 0

    def scored(at: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            angle = angles(_read(args, kwargs), _first(result))
            one_minus_cosine = 2 * torch.sin(angle / 2) ** 2
            sums[at] += torch.stack([one_minus_cosine.sum(), angle.sum() / math.pi, torch.ones_like(angle).sum()]).cpu()

        return look

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for at, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(scored(at), with_kwargs=True).remove)
        for batch_BS in batches:
            run(batch_BS)
            tokens += batch_BS.numel()
    influence, distance, count = sums.unbind(1)
    return LayerScores((influence / count).tolist(), (distance / count).tolist(), (count / tokens).int().tolist())


@contextlib.contextmanager
def looped(window: Sequence[nn.Module], repeats: int) -> Iterator[None]:
    """While it lasts, these layers F, neighbours in their model, run so often: x += (F(x) - x) / repeats."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def go_on(last: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        state = _read(*calls[0])
        state = state + (_first(result) - state) / repeats
        for _ in range(repeats - 1):
            hidden = state
            for layer, (given, named) in zip(window, calls, strict=True):  # forward passes these hooks by
                hidden = _first(layer.forward(hidden, *given[1:], **named) if given
                                else layer.forward(**{**named, "hidden_states": hidden}))  # fmt: skip
            state = state + (hidden - state) / repeats
        calls.clear()
        return (state, *result[1:]) if isinstance(result, tuple) else state

    with contextlib.ExitStack() as hooks:
        for layer in window:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        hooks.callback(window[-1].register_forward_hook(go_on, with_kwargs=True).remove)
        yield


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that a layer is called with: transformers gives it by place, Megatron by name."""
    return args[0] if args else kwargs["hidden_states"]


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def mean_loss(run: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> float:
    """Nats per next token of ``run``'s logits [B, S, V]."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch_BS in batches:
            logits_BVS, targets_BS = run(batch_BS)[:, :-1].float().transpose(1, 2), batch_BS[:, 1:]
            total += float(F.cross_entropy(logits_BVS, targets_BS, reduction="sum"))
            count += targets_BS.numel()
    return total / count
