"""What an ablation found so far: results.json (the guide says what it holds), results.md and results.png."""

from __future__ import annotations

import json
import statistics
from typing import Any

from megatron_recursive.ablation.config import Arm
from megatron_recursive.ablation.runs import Study
from megatron_recursive.data.files import replacing
from megatron_recursive.plots.ablation import plot_ablation

VERSION = 1  # of results.json
LIKE = 0.02  # FLOPs that differ by less are the same


def write_results(study: Study, command: str, *, picture: bool) -> dict[str, Any]:
    """Into the folder of the ablation, written beside what is there and renamed; returns what results.json holds."""
    figures, folder = found(study, command), study.ablation.output
    with replacing(folder / "results.json", folder / "results.md") as (data, table):
        data.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        table.write_text(table_of(figures), encoding="utf-8")
    if picture:
        plot_ablation(figures, folder / "results.png")
    return figures


def found(study: Study, command: str) -> dict[str, Any]:
    """Each recursive arm against each plain one of its width; without plain ones, each against its width's first."""
    arms = [_arm(study, arm) for arm in study.ablation.arms]
    pairs = [(a, b) for a in arms for b in arms if b["plain"] and not a["plain"] and a["width"] == b["width"]]
    first = {arm["width"]: arm for arm in arms[::-1]}
    pairs = pairs or [(arm, first[arm["width"]]) for arm in arms if arm is not first[arm["width"]]]
    return {
        "version": VERSION, "command": command, "equal": study.ablation.equal, "reference": study.ablation.reference,
        "planned": study.size()[0], "failed": list(study.failures.values()), "arms": arms,
        "comparisons": [_compare(a, b) for a, b in pairs if a["losses"] and b["losses"]],
        "runs": list(study.results.values()),
    }  # fmt: skip


def _arm(study: Study, arm: Arm) -> dict[str, Any]:
    facts, rate, iterations = study.facts[arm.name], study.best(arm), study.iterations(arm)
    done = [study.results[run] for run in study.known() if (run.arm, run.rate) == (arm, rate) and run in study.results]
    losses, cosines = [r["loss"] for r in done], [r["token cosine"] for r in done if r["token cosine"] is not None]
    edges = {arm.rates[0]: "lower", arm.rates[-1]: "higher"} if len(arm.rates) > 1 else {}
    read = statistics.fmean(r["tokens"] for r in done) if done else iterations * facts["tokens read per iteration"]
    return {
        "arm": arm.name,
        **{key: facts[key] for key in ("plain", "layers", "width", "passes", "parameters held", "stacks")},
        "iterations": iterations, "tokens": round(read), "FLOPs": study.run(arm, arm.rates[0], 0).flops,
        "lr": rate, "edge": f"best at the edge: add a {edges[rate]} rate" if rate in edges else None,
        "by lr": {f"{run.rate:g}": study.results[run]["loss"] for run in study.grid(arm) if run in study.results},
        "losses": losses, "mean": statistics.fmean(losses) if losses else None,
        "spread": max(losses) - min(losses) if len(losses) > 1 else None,
        "blocks": [statistics.fmean(block) for block in zip(*(r["blocks"] for r in done), strict=True)],
        "token cosine": statistics.fmean(cosines) if cosines else None,
    }  # fmt: skip


def _compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    gain, ratio = b["mean"] - a["mean"], a["FLOPs"] / b["FLOPs"]
    own = " (its own layers)" if b["plain"] and not a["plain"] and a["layers"] == b["layers"] else ""
    spread, apart, verdict = None, False, "; a single seed has no spread to judge by"
    if a["spread"] is not None and b["spread"] is not None:
        spread, apart = max(a["spread"], b["spread"]), max(a["losses"]) < min(b["losses"])
        verdict = f", {'more than' if abs(gain) > spread else 'within'} the spread of {spread:.3f} over the seeds"
        if apart and gain <= spread:
            verdict = f", its worst seed ahead of the other's best (the spread over the seeds is {spread:.3f})"
    beats, better = "beats" if apart or gain > (spread or 0) else "does not beat", "better" if gain > 0 else "worse"
    cost = "the same FLOPs" if abs(ratio - 1) < LIKE else f"{ratio:.3g} times the FLOPs"
    said = (f"{a['arm']} {beats} {b['arm']}{own}: {a['mean']:.3f} against {b['mean']:.3f}, {abs(gain):.3f} nats "
            f"{better}{verdict}, at {cost}.")  # fmt: skip
    return {"arm": a["arm"], "against": b["arm"], "gain": gain, "spread": spread, "FLOPs ratio": ratio, "said": said}


def table_of(figures: dict[str, Any]) -> str:
    """The text of results.md."""
    arms, runs = figures["arms"], figures["runs"]
    commits = sorted({f"{r['commit']['hash'][:7]}{' (changed)' * r['commit']['changed']}" for r in runs if r["commit"]})
    rates = sorted({rate for arm in arms for rate in arm["by lr"]}, key=float)
    rows = [["arm", "layers x passes", "parameters", "iterations", "tokens", "FLOPs", "best rate", "seeds",
             "held-out loss", "spread", "after each block", "token cosine", *(f"first seed, {rate}" for rate in rates)]]
    for arm in arms:
        rows.append([
            arm["arm"], f"{arm['layers']} x {arm['passes']}", f"{arm['parameters held']:,}", f"{arm['iterations']:,}",
            f"{arm['tokens']:,}", f"{arm['FLOPs']:.3g}",
            (f"{arm['lr']:g}" if arm["lr"] else "-") + (f" ({arm['edge']})" if arm["edge"] else ""),
            str(len(arm["losses"])), _number(arm["mean"]), _number(arm["spread"]),
            ", ".join(map(_number, arm["blocks"])) or "-", _number(arm["token cosine"]),
            *(_number(arm["by lr"].get(rate)) for rate in rates),
        ])  # fmt: skip
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join([
        f"# {len(arms)} arms at equal {figures['equal'].replace('flops', 'training FLOPs')}", "",
        f"`{figures['command']}`, commit {', '.join(commits) or '-'}: {len(runs)} of {figures['planned']} runs done.",
        "Held-out loss in nats per token, mean over the seeds at the best rate; spread: largest minus smallest.", "",
        *lines, "", *(f"* {each['said']}" for each in figures["comparisons"]),
        *(f"* failed: {each}" for each in figures["failed"]), "", "![losses by arm and by rate](results.png)", "",
    ])  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
