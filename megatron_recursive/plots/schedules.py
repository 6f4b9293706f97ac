"""What changes from step to step of a training, from its knobs: depth, gradient, the weight of each block's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans, build_plan
from megatron_recursive.plan.deep_supervision import share_of, supervised
from megatron_recursive.plan.knobs import DEEP
from megatron_recursive.plots.picture import COLOURS, pyplot_for, save_picture

Cost = Callable[[RecursionPlan], float]  # FLOPs a token of a training step
STEPS = 1000  # drawn at most
STYLES = tuple(zip(COLOURS, "osD^vPX", ("-", "--", "-.", ":", "-", "--", "-."), strict=True))


def plot_schedules(steps: StepPlans, output: Path, cost: Cost | None = None) -> None:
    """Draw the steps of a run; a UserError says where that is not possible. Without ``cost``, FLOPs are not told."""
    figure = pyplot_for(output, "--output").figure(figsize=(12, 8), layout="constrained")
    weighed, said = three_schedules(steps), steps.describe() or "all steps run the model's own plan"
    axes = [figure.add_subplot(2, 2, n) for n in range(1, 4 + bool(cost or weighed))]
    draw_steps(axes, steps, None if weighed else cost)
    if weighed:
        draw_three(axes[3], weighed, cost)
    figure.suptitle(said.replace(" | ", "\n"), fontsize="medium")
    save_picture(figure, output, dpi=130)


def draw_steps(axes: list[Any], steps: StepPlans, cost: Cost | None) -> None:
    """Depth; passes with and without gradient; weights of the losses by block; with ``cost``, FLOPs."""
    places = list(range(0, steps.iterations, -(-steps.iterations // STEPS)))
    plans = [steps.plan_at(place) for place in places]
    shares = [1.0 if steps.ramp is None else share_of(steps.ramp, place) for place in places]
    own = [supervised(steps.own_plan(n + 1), steps.config, share) for n, share in zip(places, shares, strict=True)]
    ends = [[p.supervised_weight for p in plan.block_ends] for plan in own]
    panels: dict[str, dict[str, tuple[str, list[float]]]] = {
        "depth": {"of a step": (".", [plan.depth for plan in plans]),
                  "its mean": ("-", [steps.expected_depth(place) for place in places])},
        "passes": {"of a step": (".", [plan.num_passes for plan in plans]),
                   "with gradient": ("x", [len(plan.grad_passes) for plan in plans])},
        "weight of the loss, at the model's depth": {
            f"after block {block + 1}": (STYLES[block % len(STYLES)][2],
                                         [each[block] if block < len(each) else math.nan for each in ends])
            for block in range(len(ends[-1]))},
        **({"FLOPs a token": {"of a step": (".", [cost(plan) for plan in plans])}} if cost is not None else {}),
    }  # fmt: skip
    for axis, (said, curves) in zip(axes, panels.items(), strict=False):
        for (name, (style, values)), color in zip(curves.items(), cycle(COLOURS), strict=False):
            axis.plot(places, values, style, color=color, ms=4, lw=2, label=name)
        axis.set(xlabel="iteration", ylabel=said, ylim=(-0.02 if "weight" in said else 0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", ncols=1 + len(curves) // 12)


def three_schedules(steps: StepPlans) -> dict[str, RecursionPlan]:
    """The plan under each schedule of deep supervision, and without it (``none``); empty where it can have none."""
    config, knobs = steps.config, RecursionConfig.__dataclass_fields__
    if steps.plan.num_blocks < 2 or config.exit_gate or build_plan(config) != steps.plan:
        return {}
    on: dict[str, Any] = {"enable_deep_supervision": True, "deep_supervision_warmup": None}
    each = {name: {**on, "deep_supervision_schedule": name} for name in knobs[DEEP[1]].metadata["choices"]}
    each["none"] = {name: knobs[name].default for name in (*DEEP, "enable_deep_supervision")}
    return {name: build_plan(replace(config, **changes)) for name, changes in each.items()}


def draw_three(axis: Any, plans: dict[str, RecursionPlan], cost: Cost | None) -> None:
    """Weight by block under each schedule; the legend says what it costs."""
    for (color, marker, line), (name, plan) in zip(STYLES, plans.items(), strict=False):
        ends = [p.supervised_weight for p in plan.block_ends]
        said = f"{name}: {len(plan.grad_passes)} of {plan.num_passes} passes with gradient, "
        said += f"losses of {sum(end > 0 for end in ends)}"
        said += "" if cost is None else f", {cost(plan) / cost(plans['none']):.3g} x the FLOPs"
        axis.plot(range(1, len(ends) + 1), ends, line, marker=marker, color=color, label=said)
    axis.set(xlabel="block", ylabel="weight of its loss, by schedule", ylim=(-0.02, 1.4))
    axis.set_xticks(range(1, plans["none"].num_blocks + 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
