"""Pictures and words for a simulated pipeline. A code is trip + 1 forward, -(trip + 1) backward, 0 idle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.picture import pyplot_for, save_picture

EXACT_COLUMNS, SAMPLED_COLUMNS = 160, 120
MAX_ROWS, MAX_TEXT_RANKS = 64, 16  # a picture of more ranks shows every n-th
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Trips = Sequence[Sequence[int]]  # the numbers of the passes of each, from 1


def described(timeline: Any, plan: RecursionPlan, report: dict[str, Any]) -> str:
    """The step of few stages in letters, and what was simulated, in lines. ``timeline`` is the simulated one."""
    stages = len(timeline.busy)
    if stages > MAX_TEXT_RANKS:
        return report_text(report)
    units = timeline.makespan * stages  # of one forward of a stage's layers
    rows = timeline.sample(range(stages), round(units) if units <= EXACT_COLUMNS else SAMPLED_COLUMNS)
    return f"{text_timeline(rows, plan, timeline.costs.passes, timeline.makespan)}\n\n{report_text(report)}"


def trip_names(trips: Trips) -> list[str]:
    """Each trip by its passes."""
    return [f"pass {each[0]}" if len(each) == 1 else f"passes {each[0]}-{each[-1]}" for each in trips]


def text_timeline(rows: Sequence[Sequence[int]], plan: RecursionPlan, trips: Trips, makespan: float) -> str:
    """A line per rank: a letter per trip (or block, where trips are too many), capital in the backward, idle a dot."""
    by_trip = len(trips) <= len(LETTERS)
    lines = []
    for rank, row in enumerate(rows):
        letters = []
        for code in row:
            group = abs(code) - 1 if by_trip or not code else plan.passes[trips[abs(code) - 1][-1] - 1].block
            letter = LETTERS[group % len(LETTERS)]
            letters.append("." if code == 0 else letter if code > 0 else letter.upper())
        lines.append(f"rank {rank:<4}{''.join(letters)}")
    first, *others = trip_names(trips) if by_trip else ("block 1", "block 2")
    more = f"b and B those of {others[0]}, ..., " if others else ""
    lines.append(f"(a = forward of {first}, A = its backward, {more}. = idle; a column is "
                 f"{makespan / len(rows[0]):.3g} time units)")  # fmt: skip
    return "\n".join(lines)


def report_text(report: dict[str, Any]) -> str:
    """What was simulated, in lines. One time unit is a forward of all layers on one tensor-parallel group."""
    idle, peak = report["idle"], report["peak_live_activations"]
    lines = [
        f"{report['stages']} stages, {report['micro_batches']} micro-batches, {report['passes']} passes "
        f"({report['passes_with_gradient']} with gradient){said_of_trips(report['trips'])}, "
        f"{'two phases' if report['phases'] == 2 else 'one phase'}",
        "time unit: one forward of a micro-batch through all layers on one rank (or TP group); messages take no time",
        "",
        f"{'schedule':<32}{'efficiency':>10}{'step time':>12}",
    ]
    for name, one in report["schedules"].items():
        lines.append(f"{name:<32}{one['efficiency']:>10.3f}{one['step_time']:>12.2f}")
    lines += ["(efficiency: work / (stages x step time))", "", f"{'rank':<32}{'idle':>10}{'peak live':>12}"]
    shown = range(len(idle)) if len(idle) <= 16 else (*range(4), None, *range(len(idle) - 4, len(idle)))
    lines += ["..." if r is None else f"{r:<32}{idle[r]:>10.2f}{peak[r]:>12}" for r in shown]
    lines.append("(peak live: most passes of micro-batches whose activations a rank holds at once)")
    lines += ["", f"{'messages in a step':<32}{'forward':>10}{'backward':>12}{'of which zero answers':>24}"]
    names = {"neighbours": "each stage to the next", "last to first": "last stage to first"}
    for where, n in report["messages"].items():
        lines.append(f"{names[where]:<32}{n['forward']:>10}{n['backward']:>12}{n['zero answers']:>24}")
    lines += ["", f"simulated in {report['seconds']:.1f} s"]
    return "\n".join(lines)


def said_of_trips(trips: Trips) -> str:
    """Nothing where every pass is a trip."""
    shared = any(len(each) > 1 for each in trips)
    return f" in {len(trips)} trip{'s' * (len(trips) > 1)} around the stages" if shared else ""


def plot_timeline(timeline: Any, plan: RecursionPlan, output: str | Path) -> Path:
    """Draw a simulated step, a row per rank: forwards blue, backwards red, darker from trip to trip.

    Raises:
        UserError: the suffix is no picture's, matplotlib is not installed, or the picture cannot be written.
    """
    output = Path(output)
    pyplot, stages = pyplot_for(output, "--timeline"), len(timeline.busy)
    ranks = range(0, stages, -(-stages // MAX_ROWS))
    trips: Trips = timeline.costs.passes
    rows: list[list[tuple[float, float, int]]] = [timeline.boxes(rank) for rank in ranks]
    height = min(max(0.38 * len(rows), 1.0), 9.0) + 1.5
    figure, axis = pyplot.subplots(figsize=(12, height), layout="constrained")
    edge = 0.4 if sum(map(len, rows)) < 2500 else 0.0
    for at, row in enumerate(rows):
        spans = [(start, end - start) for start, end, _ in row]
        axis.broken_barh(spans, (at - 0.45, 0.9), facecolors=[_color(code, trips) for *_, code in row],
                         edgecolors="white", linewidth=edge)  # fmt: skip
    _axes(axis, ranks, max(end for row in rows for _, end, _ in row))
    axis.set_title(f"{stages} stages, {timeline.micro_batches} micro-batches, {plan.num_passes} passes"
                   f"{said_of_trips(trips)}: efficiency {timeline.efficiency:.3f}", fontsize="medium")  # fmt: skip
    handles = _legend(timeline.costs)
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize="small", frameon=False)
    save_picture(figure, output, dpi=130)
    return output


def _axes(axis: Any, ranks: Sequence[int], end: float) -> None:
    axis.set_xlim(0, end)
    axis.set_ylim(len(ranks) - 0.5, -0.5)
    step = max(1, len(ranks) // 16)
    axis.set_yticks(range(0, len(ranks), step), [f"rank {rank}" for rank in ranks[::step]])
    axis.set_xlabel("time, in forwards of a micro-batch through all layers on one rank (or TP group)")
    axis.set_facecolor("#eeeeee")


def _color(code: int, trips: Trips) -> tuple[float, float, float]:
    """Forward: blue, backward: red, pale in the first trip and full in the last."""
    depth = (abs(code) - 1) / max(len(trips) - 1, 1)
    pale, full = ((0.78, 0.87, 0.97), (0.05, 0.25, 0.55)) if code > 0 else ((0.99, 0.85, 0.75), (0.70, 0.07, 0.10))
    red, green, blue = (a + depth * (b - a) for a, b in zip(pale, full, strict=True))
    return red, green, blue


def _legend(costs: Any) -> list[Any]:
    from matplotlib.patches import Patch

    trips, names = costs.passes, trip_names(costs.passes)
    shown = sorted({0, len(trips) // 2, len(trips) - 1})
    worked = [k for k, stages in enumerate(costs.backward) if any(stages)]
    handles = [Patch(color=_color(k + 1, trips), label=f"forward of {names[k]}") for k in shown]
    handles += [Patch(color=_color(-k - 1, trips), label=f"backward of {names[k]}")
                for k in sorted({worked[0], worked[-1]})]  # fmt: skip
    return [*handles, Patch(color="#eeeeee", label="idle")]
