"""The page: answers first, then all figures as pictures and tables, in one file that asks for no other."""

from __future__ import annotations

import base64
import datetime
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.plots import depth_sweep, health
from megatron_recursive.plots.layer_scores import plot_layer_scores
from megatron_recursive.plots.loss_curve import draw_curves
from megatron_recursive.plots.picture import png_of, single_axes
from megatron_recursive.plots.recursion_plan import plot_plan
from megatron_recursive.plots.run_summary import summarize_runs
from megatron_recursive.report.answers import answers, losses_by_depth
from megatron_recursive.report.subjects import Subject

TOKENS = 40  # of a sample that are shown

Part = dict[str, Any]
"""A picture, a table, or a section that holds some, as the template reads it."""


def render(subjects: Sequence[Subject], compared: Sequence[str], missing: Mapping[str, str]) -> str:
    """The HTML. ``missing``: by what is not there, the command that makes it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    swept = [{**each.found["sweep"], "model": each.name} for each in subjects if "sweep" in each.found]
    together = [("Loss by depth", _panels(depth_sweep, {"models": swept}) if swept else []),
                ("Training", _curves([each.given for each in subjects if each.figures]))]  # fmt: skip
    return page.get_template("page.html").render(
        title=" and ".join(each.name for each in subjects), compared=compared, missing=missing,
        subjects=[(each, answers(each), _sections(each)) for each in subjects],
        together=[_section(title, pictures) for title, pictures in together if pictures],
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    )  # fmt: skip


def _sections(subject: Subject) -> list[Part]:
    found, (rows, _, source) = subject.found, losses_by_depth(subject)
    exits = [{"exit": name, **point} for name, each in found.get("sweep", {}).get("exits", {}).items()
             for point in each["points"]]  # fmt: skip
    if "sequence_length" in found.get("sweep", {}):
        source += f" in samples of {found['sweep']['sequence_length']:,}, as long as the FLOPs below are for"
    sections = [_section(f"Depths, from {source}", [], [
        _table("By depth", rows, "depth passes loss standard_error perplexity accuracy flops_per_token"),
        _table("Leaving early, estimated", exits, "exit threshold mean_depth loss accuracy flops_per_token"),
    ])]  # fmt: skip
    if "health" in found:
        record = found["health"]
        tried = [{"with": "the model as it is", **record}]
        tried += [{"with": "one step more", **record["one_more"]}] if "one_more" in record else []
        tried += [{"with": f"the state reset before the last {n['remaining']}", **n} for n in record.get("reset", ())]
        sections.append(_section("Health of the states", _panels(health, record), [
            _table("By pass", record["passes"], "pass block stack target change token_cosine loss accuracy agrees"),
            _table("States reset", tried, "with loss standard_error")]))  # fmt: skip
    if subject.figures:
        sections.append(_section("Training in words", lines=summarize_runs([subject.given])[0].splitlines()))
    if "count" in found:
        sizes, flops = found["count"]["parameters"], found["count"]["flops_per_token"]
        held = [{"part": part, **{kind: sizes[kind][part] for kind in sizes}} for part in sizes["held"]]
        steps = [{"part": part, **each} for part, each in flops.items() if isinstance(each, dict)]
        sections.append(_section("Counts", [], [_table("Parameters", held, "part held unrolled"),
                                 _table("FLOPs of a token of training", steps, "part forward backward")]))  # fmt: skip
    if subject.plan is not None:
        said = f"The plan: {subject.plan.num_passes} passes, what each reads and learns from"
        sections.append(_section("Plan", [_drawn(said, plot_plan, subject.plan)]))
    if "layers" in found:
        drawn = _drawn("Block influence and angular distance by layer", plot_layer_scores, found["layers"])
        by_layer = _table("By layer", found["layers"]["layers"], "layer influence distance applied")
        sections.append(_section("Layers", [drawn], [by_layer]))
    scores = [{"task": task, "depth": each["depth"], "metric": name.replace(",none", ""), "score": value,
               "standard_error": values.get(name.replace(",", "_stderr,"))}
              for each in found.get("scores", ()) for task, values in each["results"].items()
              for name, value in values.items() if "," in name and "_stderr" not in name]  # fmt: skip
    samples = [_table(f"{answer['prompt']!r} goes on with {answer['text']!r}", steps[:TOKENS], " ".join(steps[0]))
               for answer, steps in _samples(found.get("samples", ()))]  # fmt: skip
    sections += [_section("Tasks of lm-eval", [], [_table("Scores", scores, "task depth metric score standard_error")]),
                 _section("Samples: what each block would say, and how probable it is", [], samples)]  # fmt: skip
    return [each for each in sections if each["pictures"] or each["tables"] or each["lines"]]


def _samples(lines: Sequence[Part]) -> list[tuple[Part, list[Part]]]:
    """Each answer with what the blocks would have said in the place of its tokens."""
    ends = [at for at, line in enumerate(lines) if "step" not in line]
    return [(lines[end], [{f"block_{each['block']}": f"{each['text']!r} {each['probability']:.2f}"
                           for each in step["blocks"]} for step in lines[start:end]])
            for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False) if start < end]  # fmt: skip


def _section(title: str, pictures: Sequence[Part] = (), tables: Sequence[Part] = (), lines: Sequence[str] = ()) -> Part:
    return {"title": title, "pictures": pictures, "tables": [each for each in tables if each["rows"]], "lines": lines}


def _table(caption: str, rows: Sequence[Mapping[str, Any]], columns: str) -> Part:
    """Columns that no row has are left out."""
    keys = [key for key in columns.split() if any(row.get(key) is not None for row in rows)]
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    return {"caption": caption, "heads": [key.replace("_", " ") for key in keys], "rows": cells}


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 or isinstance(value, int) else f"{value:.4g}"
    return "" if value is None else str(value)


def _panels(kind: Any, record: Part) -> list[Part]:
    axes = single_axes(len(kind.PANELS))
    kind.draw_panels(axes, record)
    return [_embedded(png_of(axis), said) for axis, said in zip(axes, kind.PANELS, strict=True)
            if axis.has_data()]  # fmt: skip


def _curves(runs: Sequence[str]) -> list[Part]:
    return [_embedded(png_of(axis), axis.get_title()) for axis in draw_curves(runs)] if runs else []


def _drawn(said: str, draw: Any, what: Any) -> Part:
    with tempfile.TemporaryDirectory() as folder:
        draw(what, Path(folder) / "wide.png")
        return _embedded((Path(folder) / "wide.png").read_bytes(), said) | {"wide": True}


def _embedded(png: bytes, said: str) -> Part:
    return {"uri": f"data:image/png;base64,{base64.b64encode(png).decode()}", "said": said, "wide": False}
