"""An ablation's results.json as a picture: final loss by arm with every seed, and loss against learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_recursive.plots.picture import pyplot_for, save_picture


def plot_ablation(figures: dict[str, Any], output: Path) -> None:
    """Draw what there is so far; a UserError says where that is not possible."""
    pyplot, arms = pyplot_for(output, "--output"), figures["arms"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.6 + 0.5 * max(len(arms), 4)), layout="constrained")
    for place, arm in enumerate(arms):
        style: dict[str, Any] = {"color": f"C{place % 10}"}
        marker = "os^D"[place // 10 % 4]
        left.plot(arm["losses"], [place] * len(arm["losses"]), marker, alpha=0.6, **style)
        left.plot([math.nan if arm["mean"] is None else arm["mean"]], [place], "|", ms=24, mew=2, **style)
        rates, losses = [float(rate) for rate in arm["by lr"]], list(arm["by lr"].values())
        right.plot(rates, losses, f"{marker}-", label=arm["arm"], **style)
    left.set_yticks(range(len(arms)), [f"{arm['arm']}\n{arm['FLOPs']:.2g} FLOPs" for arm in arms], fontsize="small")
    left.set(ylim=(len(arms) - 0.5, -0.5), xlabel="held-out loss at the best rate, nats per token (bar: mean)")
    right.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, first seed")
    rates = sorted({float(rate) for arm in arms for rate in arm["by lr"]})
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.set_xticks([], minor=True)
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_picture(figure, output, dpi=130)
