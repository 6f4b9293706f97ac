"""A plan as a picture: each pass a box on the line of the state that it moves, with what it reads and learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.picture import COLOURS, pyplot_for, save_picture

WIDEST, SHOWN = 40, 24  # inches; numbers of passes and of blocks


def plot_plan(plan: RecursionPlan, output: Path, title: str = "") -> None:
    """Draw a plan; a UserError says where that is not possible."""
    size = min(max(9, 2 + 0.5 * plan.num_passes), WIDEST), 4.8
    figure, axis = pyplot_for(output, "--output").subplots(figsize=size, layout="constrained")
    draw_plan(axis, plan)
    axis.set_title(title, fontsize="medium")
    named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    save_picture(figure, output, dpi=130)


def draw_plan(axis: Any, plan: RecursionPlan) -> None:
    """Pass i lies at x = i + 1; from below, the lines are the input, the latent state if there is one, the output."""
    used = {name for p in plan.passes for name in (p.target, *plan.sources(p), *p.moved_with)}
    lanes = {name: float(y) for y, name in enumerate(sorted(used))}  # input, latent, output
    colours = dict(zip(dict(plan.stacks), COLOURS, strict=False))
    top, end, size = len(lanes) - 1, plan.num_passes + 0.5, 9 if plan.num_passes <= 40 else 5
    for block in range(plan.num_blocks):
        places = [p.index + 1 for p in plan.passes if p.block == block]
        axis.axvspan(places[0] - 0.5, places[-1] + 0.5, color="#eeeeee" if block % 2 else "white", zorder=0)
        if block % -(-plan.num_blocks // SHOWN) == 0:
            middle = (places[0] + places[-1]) / 2
            axis.text(middle, top + 1.15, f"block {block + 1}", ha="center", fontsize=size)
    axis.hlines(lanes.values(), 0.3, end, color="#888888", lw=1, zorder=1)
    for p in plan.passes:
        x, y, reads = p.index + 1, lanes[p.target], plan.sources(p)
        axis.bar(x, 0.56, 0.72, y - 0.28, color=colours[p.stack] if p.grad else "white", edgecolor=colours[p.stack],
                 lw=2, hatch=None if p.grad else "///", zorder=3,
                 label=f"{p.stack} layers, {'with gradient' if p.grad else 'no gradient'}")  # fmt: skip
        for at, name in enumerate(reads):
            beside = x + 0.3 * (at + 1) / (len(reads) + 1) - 0.15
            start, tip = (beside, lanes[name]), (beside, y + (-0.28 if lanes[name] < y else 0.28))
            if name == p.target:
                start, tip = (x - 0.62, y), (x - 0.36, y)
            axis.annotate("", tip, start, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.1}, zorder=2)
        words = [f"{p.step:.2g}"] * (p.move == "step" and p.step != 1) + [p.move] * (p.move != "step")
        words += [p.combine] * (p.combine != "sum")
        axis.text(x, y, "\n".join(words), ha="center", va="center", fontsize=size - 1, zorder=4,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if words else None)  # fmt: skip
        if p.cuts_states:
            axis.axvline(x - 0.5, color="black", ls=":", lw=1.5, label="states cut from the graph")
    taught = [p for p in plan.passes if p.supervised_weight]
    marks = {"language-model loss, with its weight": ("*", taught, 0.48, 11),
             "halting loss": ("D", [p for p in plan.passes if p.halt_weight], 0.72, 6),
             "exit gate": ("P", plan.block_ends if plan.exit_gate else (), 0.72, 6)}  # fmt: skip
    for color, (name, (marker, passes, above, width)) in zip(reversed(COLOURS), marks.items(), strict=False):
        if passes:
            places = [p.index + 1 for p in passes]
            axis.plot(places, [top + above] * len(places), marker, ms=width, color=color, label=name, zorder=5)
    for p in taught:
        axis.text(p.index + 1.15, top + 0.5, f"{p.supervised_weight:.2g}", fontsize=size, va="center")
    axis.set(xlim=(0.3, end), ylim=(-0.6, top + 1.4), xlabel="pass (an arrow: what it reads)")
    axis.set_xticks(range(1, plan.num_passes + 1, -(-plan.num_passes // SHOWN)))
    axis.set_yticks(list(lanes.values()), list(lanes))
    axis.spines[["top", "right", "left"]].set_visible(False)
