"""The page: answers first, then all figures as pictures and tables, in one file that asks for no other."""

from __future__ import annotations

import base64
import datetime
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_recursive import __version__
from megatron_recursive.plots import depth_sweep, health
from megatron_recursive.plots.layer_scores import plot_layer_scores
from megatron_recursive.plots.loss_curve import draw_curves
from megatron_recursive.plots.picture import single_axes
from megatron_recursive.plots.recursion_plan import plot_plan
from megatron_recursive.plots.run_summary import summarize_runs
from megatron_recursive.report.answers import answers, losses_by_depth
from megatron_recursive.report.subjects import Subject

SAMPLED = 40  # tokens that are shown
LOSS, ACCURACY, FLOPS = "loss, nats a token", "share right", "FLOPs a token"


def render(subjects: Sequence[Subject], compared: Sequence[str], missing: Mapping[str, str]) -> str:
    """The HTML. ``missing``: by what is not there, the command that makes it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("megatron_recursive.report", "")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    together = _together(subjects) if len(subjects) > 1 else []
    return page.get_template("page.html").render(
        title=" and ".join(each.name for each in subjects), version=__version__, compared=compared,
        subjects=[(each, answers(each)) for each in subjects], together=together,
        parts=[(each, _sections(each, alone=not together)) for each in subjects],
        missing=missing,
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )  # fmt: skip


def _together(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    runs, swept = [each.given for each in subjects if each.figures], [x for x in subjects if "sweep" in x.found]
    models = [{**each.found["sweep"], "model": each.name} for each in swept]
    pictures = _panels(depth_sweep, {"models": models}) if models else []
    curves = _section("Training", _curves(runs)) if runs else None
    return [*filter(None, [_section("Loss by depth", pictures) if models else None, curves])]


def _sections(subject: Subject, *, alone: bool) -> list[dict[str, Any]]:
    found, sections = subject.found, []
    rows, _, source = losses_by_depth(subject)
    if rows:
        exits = [{"exit": name, **point} for name, each in found.get("sweep", {}).get("exits", {}).items()
                 for point in each["points"]]  # fmt: skip
        measures = {"loss": LOSS, "accuracy": ACCURACY, "flops_per_token": FLOPS}
        sections.append(_section("Loss by depth", _panels(depth_sweep, {"models": [found["sweep"]]})
                                 if "sweep" in found and alone else [], [
            _table("By depth", rows, {"depth": "depth", "passes": "passes", **measures, "perplexity": "perplexity"}),
            _table("Leaving early, estimated", exits, {"exit": "exit", "threshold": "threshold",
                   "mean_depth": "mean depth", **measures})], [f"From {source}."]))  # fmt: skip
    if "health" in found:
        record, more = found["health"], found["health"]["one_more"]
        tried = [{"tried": f"the state reset before the last {each['remaining']}", **each} for each in record.get("reset", ())]
        tried += [{"tried": "nothing, the model as it is", **record}, {"tried": "one step more", **more}]
        sections.append(_section("Health of the states", _panels(health, record), [
            _table("By pass", record["passes"], {
                "pass": "pass", "block": "block", "stack": "stack", "target": "moves", "change": "relative change",
                "token_cosine": "cosine of tokens", "loss": LOSS, "accuracy": ACCURACY, "agrees": "agrees with the last"}),
            _table("What the loss would be", tried, {"tried": "with", "loss": LOSS})]))  # fmt: skip
    if subject.figures:
        told = summarize_runs([subject.given])[0].splitlines()
        sections.append(_section("Training", _curves([subject.given]) if alone else [], [], told))
    if subject.plan is not None:
        drawn = _drawn(f"The plan: {subject.plan.num_passes} passes, what each reads and learns from", plot_plan, subject.plan)
        sections.append(_section("Plan and counts", [drawn], _counts(found["count"]) if "count" in found else []))
    if "layers" in found:
        columns = {"layer": "layer", "influence": "block influence", "distance": "angular distance", "applied": "passes"}
        drawn = _drawn("Block influence and angular distance of each layer", plot_layer_scores, found["layers"])
        sections.append(_section("Layers", [drawn], [_table("By layer", found["layers"]["layers"], columns)]))
    if "scores" in found:
        sections.append(_section("Tasks of lm-eval", [], [_scores(found["scores"])]))
    if "samples" in found:
        sections.append(_section("Samples by block", [], _samples(found["samples"]), [
            "What each block would have said in the place of each new token, and how probable that is."]))  # fmt: skip
    return sections


def _section(
    title: str, pictures: Sequence[Any], tables: Sequence[Any] = (), lines: Sequence[str] = ()
) -> dict[str, Any]:  # fmt: skip
    return {"title": title, "pictures": pictures, "tables": [each for each in tables if each["rows"]], "lines": lines}


def _table(caption: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, Any]:
    """``columns``: key -> heading; those that no row has are left out."""
    kept = {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)}
    return {"caption": caption, "heads": kept.values(), "rows": [[_cell(row.get(key)) for key in kept] for row in rows]}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _counts(record: dict[str, Any]) -> list[dict[str, Any]]:
    sizes, flops = record["parameters"], record["flops_per_token"]
    parts = [{"part": part.replace("_", " "), "held": held, "unrolled": sizes["unrolled"][part]}
             for part, held in sizes["held"].items() if held]  # fmt: skip
    steps = [{"part": part.replace("_", " "), **each} for part, each in flops.items() if isinstance(each, dict)]
    return [_table("Parameters", parts, {"part": "part", "held": "held", "unrolled": "applied in a pass"}),
            _table(f"FLOPs of a token of training, sequences of {record['model']['sequence_length']:,}", steps,
                   {"part": "part", "forward": "forward", "backward": "backward"})]  # fmt: skip


def _scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = [{"task": task, "metric": name.replace(",none", ""), "depth": each["depth"], "value": value,
             "error": values.get(name.replace(",", "_stderr,"))}
            for each in records for task, values in each["results"].items() for name, value in values.items()
            if "," in name and "_stderr" not in name]  # fmt: skip
    return _table("By task", rows, {"task": "task", "metric": "metric", "depth": "depth", "value": "score",
                                    "error": "standard error"})  # fmt: skip


def _samples(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table a prompt; what is not the last block's word stands out."""
    tables, steps = [], list[dict[str, Any]]()
    for line in lines:
        if "blocks" in line and len(line["blocks"]) and isinstance(line["blocks"], list):
            steps.append({each["block"]: f"{each['text']!r} {each['probability']:.2f}" for each in line["blocks"]})
        elif "prompt" in line:
            blocks = {block: f"block {block}" for step in steps for block in step}
            tables.append(_table(f"After {line['prompt']!r}: {line['text']!r}", steps[:SAMPLED], blocks))
            steps = []
    return tables


# --- pictures -------------------------------------------------------------------------------------------------------


def _panels(kind: Any, record: dict[str, Any]) -> list[dict[str, Any]]:
    axes = single_axes(len(kind.PANELS))
    (kind.draw_depth_sweep if kind is depth_sweep else kind.draw_health)(axes, record)
    return [_picture(axis.figure, said) for axis, said in zip(axes, kind.PANELS, strict=True)]


def _curves(runs: Sequence[str]) -> list[dict[str, Any]]:
    return [_picture(axis.figure, axis.get_title()) for axis in draw_curves(runs)]


def _picture(figure: Any, said: str) -> dict[str, Any]:
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=140)
    pyplot.close(figure)
    return _embedded(drawn.getvalue(), said, wide=False)


def _drawn(said: str, draw: Any, what: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        draw(what, Path(folder) / "picture.png")
        return _embedded((Path(folder) / "picture.png").read_bytes(), said, wide=True)


def _embedded(png: bytes, said: str, *, wide: bool) -> dict[str, Any]:
    return {"uri": f"data:image/png;base64,{base64.b64encode(png).decode()}", "said": said, "wide": wide}
