"""What leaving early would cost and save: loss against mean depth and FLOPs, for every exit over its thresholds.

All thresholds are read from one sweep, in which every token went through all blocks: an estimate, since under an exit
later tokens see the keys and values that those which left had then. ``measure`` runs the model itself under an exit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.analysis.depth_sweep import Sweep
from megatron_recursive.hf.model.exits_recursive_gpt import LEAVE_BELOW, ExitOptions, asking_flops, threshold_of

POINTS = 9  # of a frontier, evenly spread over mean depths


def frontier(sweep: Sweep, found: dict[str, Tensor], mean_depth: float | None, measures: bool) -> dict[str, Any]:
    """By exit: ``points`` from the shallowest mean depth to full depth, and ``asked``, that of ``mean_depth``."""
    result: dict[str, Any] = {}
    for exit, options in sweep.exits.items():
        signal, blocks = found[exit], options.max_blocks
        asked = [1 + (blocks - 1) * n / (POINTS - 1) for n in range(POINTS)]
        thresholds = dict.fromkeys(threshold_for(exit, signal, each, blocks) for each in asked)
        points = [_point(sweep, found, options, each, measures) for each in thresholds]
        result[exit] = {"argument": threshold_of(exit), "points": points}
        if mean_depth is not None:
            chosen = threshold_for(exit, signal, min(max(mean_depth, 1.0), blocks), blocks)
            result[exit]["asked"] = _point(sweep, found, options, chosen, measures)
    return result


def left_after(exit: str, signal: Tensor, threshold: float) -> Tensor:
    """Blocks that each token takes, [tokens]; ``signal`` is that of all blocks but the last."""
    stays = signal >= threshold if exit in LEAVE_BELOW else signal < threshold
    return 1 + stays.cummin(0).values.sum(0)


def threshold_for(exit: str, signal: Tensor, mean_depth: float, blocks: int) -> float:
    """The one at which the mean depth is nearest; tokens of one signal leave together."""
    if exit == "argmax":
        return min(range(2, blocks + 1), key=lambda n: abs(_mean(left_after(exit, signal, n)) - mean_depth))
    below = exit in LEAVE_BELOW
    extremes = (signal.cummin(0) if below else signal.cummax(0)).values.flatten().sort(descending=below).values
    stay = round((mean_depth - 1) * signal.shape[1])  # blocks after which a token does not leave, of all tokens
    finite = extremes[extremes.isfinite()]
    beyond = 0.0
    if len(finite):  # with room: the model that leaves by it rounds otherwise
        beyond = float(torch.nextafter(finite.max(), torch.tensor(math.inf)).maximum(finite.max() * (1 + 2.0**-12)))
    if below:  # stay those of at least the threshold
        return min(float(extremes[stay - 1]), beyond) if stay else beyond
    most = {"halting": 1 - 2.0**-24, "quantile": 1.0}[exit]  # what the argument may be
    threshold = float(extremes[stay]) if stay < len(extremes) else beyond
    return min(max(threshold, 2.0**-126), most)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _point(
    sweep: Sweep, found: dict[str, Tensor], options: ExitOptions, threshold: float, measures: bool
) -> dict[str, Any]:
    taken = left_after(options.exit, found[options.exit], threshold)
    rows = torch.tensor([sweep.row_of[block] for block in range(1, options.max_blocks + 1)])[taken - 1]
    loss, choice = (found[name].gather(0, rows[None])[0] for name in ("loss", "choice"))
    point = {"threshold": threshold, "mean_depth": _mean(taken), "flops_per_token": _flops(sweep, options, taken),
             "loss": _mean(loss), "accuracy": _mean(choice == found["target"])}  # fmt: skip
    return point | ({"measured": measure(sweep, options.exit, threshold)} if measures else {})


def _flops(sweep: Sweep, options: ExitOptions, taken: Tensor) -> float:
    """Of a token: its blocks, one projection, and what its exit asks after each block but the last."""
    shape = sweep.shape
    assert shape is not None, "a model with exits is our own"
    once, twice = (sweep.flops(sweep.model.plan.with_blocks(count)) or 0.0 for count in (1, 2))
    asked = _mean(taken.clamp(max=options.max_blocks - 1))
    asking = asking_flops(options.exit, shape.hidden_size, shape.vocab_size)
    return once + (_mean(taken) - 1) * (twice - once) + asked * asking


@torch.no_grad()
def measure(sweep: Sweep, exit: str, threshold: float) -> dict[str, float]:
    """Loss and mean depth where the model itself leaves by the exit."""
    losses, blocks = [], []
    for batch in sweep.rows.split(sweep.batch_size):
        ids_BS, targets, counts = sweep.read(batch)
        outputs = sweep.model.model(input_ids=ids_BS, use_cache=False, exit=exit, **{threshold_of(exit): threshold})
        loss = F.cross_entropy(outputs.logits.float().flatten(0, 1), targets, reduction="none")
        losses.append(loss[counts])
        blocks.append(outputs.blocks.flatten()[counts])
    return {"loss": _mean(torch.cat(losses)), "mean_depth": _mean(torch.cat(blocks))}
