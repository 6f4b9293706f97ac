"""A sweep over depths as a picture: loss and settled answers by depth, and loss by mean depth and FLOPs under exits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.plots.picture import COLOURS, pyplot_for, save_picture

PANELS = ("loss by depth", "answers settled by depth", "loss by mean depth under exits", "loss by FLOPs under exits")

# A colour a model, a marker an exit.
MARKERS = {"halting": "o", "quantile": "s", "output-change": "^", "kl": "v", "argmax": "D"}


def plot_depth_sweep(record: dict[str, Any], output: Path) -> None:
    """Draw the record of the command ``sweep``; a UserError says where that is not possible."""
    pyplot = pyplot_for(output, "--output")
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_panels(list(grid.flat), record)
    save_picture(figure, output, dpi=130)


def draw_panels(axes: Sequence[Any], record: dict[str, Any]) -> None:
    """On an axis for each of :data:`PANELS`."""
    loss, settling, by_depth, by_flops = axes
    labelled: set[str] = set()
    for number, model in enumerate(record["models"]):
        colour, exits = COLOURS[number % len(COLOURS)], model["exits"]
        depths, settled = model["depths"], model["settled"]["shares"]
        trained = next(each["loss"] for each in depths if each["depth"] == model["trained_depth"])
        name = Path(model["model"]).name
        loss.plot([each["depth"] for each in depths], [each["loss"] for each in depths], "o-", color=colour, label=name)
        loss.plot(model["trained_depth"], trained, "*", color=colour, markersize=16, markeredgecolor="black")
        shares = [sum(each["share"] for each in settled[: n + 1]) for n in range(len(settled))]
        settling.plot([each["depth"] for each in settled], shares, "o-", color=colour)
        for exit, found in exits.items():
            for axis, key in ((by_depth, "mean_depth"), (by_flops, "flops_per_token")):
                axis.plot([each[key] for each in found["points"]], [each["loss"] for each in found["points"]], "--",
                          marker=MARKERS[exit], color=colour, linewidth=1, markerfacecolor="none",
                          label=exit if exit not in labelled and axis is by_depth else None)  # fmt: skip
            labelled.add(exit)
    for axis, x in ((loss, "depth (star: as trained)"), (settling, "depth"), (by_depth, "mean depth under an exit"),
                    (by_flops, "FLOPs a token under an exit")):  # fmt: skip
        axis.set(xlabel=x, ylabel="share of answers settled" if axis is settling else "loss")
        axis.grid(alpha=0.3)
        if axis in (loss, settling):
            depths = sorted({each["depth"] for model in record["models"] for each in model["depths"]})
            axis.set_xscale("log", base=2)
            axis.set_xticks(depths, map(str, depths))
        elif not labelled:
            axis.text(0.5, 0.5, "no model here can leave early", ha="center", transform=axis.transAxes)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
