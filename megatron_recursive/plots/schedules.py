"""What changes from step to step of a training, from its knobs: depth, gradient, the weight of each block's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans, build_plan
from megatron_recursive.plan.deep_supervision import share_of, supervised
from megatron_recursive.plan.knobs import DEEP
from megatron_recursive.plots.picture import COLOURS, pyplot_for, save_picture

Cost = Callable[[RecursionPlan], float]
"""FLOPs a token of a training step."""
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
    depth, passes, weights, *rest = axes
    depth.plot(places, [plan.depth for plan in plans], ".", color=COLOURS[0], ms=4, label="depth of a step")
    depth.plot(places, [steps.expected_depth(place) for place in places], "-", color=COLOURS[1], lw=2, label="its mean")
    passes.plot(places, [plan.num_passes for plan in plans], ".", color=COLOURS[0], ms=4, label="passes")
    passes.plot(places, [len(plan.grad_passes) for plan in plans], "x", color=COLOURS[1], ms=4, label="with gradient")
    shares = [1.0 if steps.ramp is None else share_of(steps.ramp, place) for place in places]
    own = [supervised(steps.own_plan(n + 1), steps.config, share) for n, share in zip(places, shares, strict=True)]
    for block in range(own[-1].num_blocks):
        color, _, line = STYLES[block % len(STYLES)]
        y = [plan.block_ends[block].supervised_weight if block < plan.num_blocks else math.nan for plan in own]
        weights.plot(places, y, line, color=color, lw=2, label=f"after block {block + 1}" if block < 12 else None)
    for axis, said in ((depth, "depth"), (passes, "passes"), (weights, "weight of the loss, at the model's depth")):
        axis.set(xlabel="iteration", ylabel=said, ylim=(-0.02 if axis is weights else 0, None))
    if cost is not None:
        rest[0].plot(places, [cost(plan) for plan in plans], ".", color=COLOURS[0], ms=4, label="of a step")
        rest[0].set(xlabel="iteration", ylabel="FLOPs a token of training", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")


def three_schedules(steps: StepPlans) -> dict[str, RecursionPlan]:
    """The plan under each schedule of deep supervision, and without it (``none``); empty where it can have none."""
    knobs = RecursionConfig.__dataclass_fields__
    off: dict[str, Any] = {"enable_deep_supervision": False, **{name: knobs[name].default for name in DEEP}}
    config = steps.config
    if steps.plan.num_blocks < 2 or config.exit_gate or build_plan(config) != steps.plan:
        return {}
    on: dict[str, Any] = {"enable_deep_supervision": True, "deep_supervision_warmup": None}
    each = {name: replace(config, **on, deep_supervision_schedule=name) for name in knobs[DEEP[1]].metadata["choices"]}
    return {name: build_plan(made) for name, made in {**each, "none": replace(config, **off)}.items()}


def draw_three(axis: Any, plans: dict[str, RecursionPlan], cost: Cost | None) -> None:
    """Weight by block under each schedule; the legend says what it costs."""
    for (color, marker, line), (name, plan) in zip(STYLES, plans.items(), strict=False):
        said = [f"{len(plan.grad_passes)} of {plan.num_passes} passes with gradient",
                f"losses of {sum(p.supervised_weight > 0 for p in plan.passes)}"]  # fmt: skip
        if cost is not None:
            said.append(f"{cost(plan) / cost(plans['none']):.3g} x the FLOPs")
        ends = [p.supervised_weight for p in plan.block_ends]
        axis.plot(range(1, len(ends) + 1), ends, line, marker=marker, color=color, label=f"{name}: {', '.join(said)}")
    axis.set(xlabel="block", ylabel="weight of its loss in the sum", ylim=(-0.02, 1.4))
    axis.set_title("schedules of deep supervision", fontsize="medium")
    axis.set_xticks(range(1, plans["none"].num_blocks + 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
