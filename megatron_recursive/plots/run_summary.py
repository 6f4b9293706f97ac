"""Runs in a few lines: what was trained, where its losses ended, whether its depth is used and earns its FLOPs."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.figures import NOTHING, blocks_of, count, duration
from megatron_recursive.plots.runs import Run, read_runs

LAST = 5  # logged values of single iterations, of which the end of training is a mean
AS_FAR = 0.98  # of the tokens or FLOPs of a run
_SHAPE = re.compile(r"(\d+) layers of width (\d+)")
_ROW = "{:<24} {:>6} {:>6} {:>7} {:>8} {:>8} {:>8}  {}"  # a line of the table: at most 100 columns


def summarize_runs(given: Sequence[str | Path]) -> tuple[str, dict[str, Any]]:
    """Text and figures of one run, or of several side by side: against one without recursion, or else the first.

    Raises:
        UserError: a file is missing, malformed (the message names the line), or holds no metrics.
    """
    runs = read_runs(given)
    figures = [_figures(run) for run in runs]
    base = next((n for n, f in enumerate(figures) if f["recursive"] is False), 0)
    compared = [_compare(runs[n], f, runs[base], figures[base]) for n, f in enumerate(figures) if n != base]
    lines = [c["said"] for c in compared] if compared else _one(figures[0], runs[0].about)
    for f in figures:
        name = f"{f['run']}: " if compared else ""
        lines += [f"{name}{line}" for line in [*_blocks_said(f), *f["alarms"]]]
    if any("gain" in each for each in compared):
        lines.append("each run is one seed: how far seeds lie apart is not in these differences, and ablate tells it")
    if not compared and figures[0]["recursive"]:
        lines.append("whether the recursion earns its FLOPs shows beside a run with --disable-recursive-refinement")
    text = "\n".join(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
    return f"{_table(figures)}\n\n{text}" if compared else text, {"runs": figures, "comparisons": compared}


def _figures(run: Run) -> dict[str, Any]:
    train, plan, about = run.of("train"), run.plan, run.about
    if not train and not run.of("held-out"):
        raise UserError(f"{run.file} holds no metrics yet; wait for the run's first logged iteration.")
    shape, last = _SHAPE.match(str(about.get("description", ""))), run.records[-1]
    values = {name: [r[name] for r in train if name in r] for name in ("lm loss", "halt loss", "total loss")}
    end: dict[str, Any] = next(iter(run.of("held-out")[-1:]), {})
    blocks, depths = blocks_of(end), blocks_of(end, of="depth")
    learned = {block: [loss for r in train if (loss := blocks_of(r).get(block)) is not None][-LAST:]
               for block in (blocks_of(train[-1]) if train else ())}  # fmt: skip
    return {
        "run": run.name, "file": str(run.file), "description": about.get("description"),
        "layers": int(shape[1]) if shape else None, "width": int(shape[2]) if shape else None,
        "passes": plan.num_passes if plan else None, "recursive": None if plan is None else not plan.is_plain,
        "first iteration": train[0]["iteration"] if train else None, "iteration": last["iteration"],
        "tokens": last.get("tokens"), "FLOPs": last.get("flops"), "FLOPs per token": about.get("FLOPs per token"),
        "seconds": max((r["elapsed"] for r in run.records if "elapsed" in r), default=None), "starts": run.starts,
        "resumed": run.resumed,
        "training": {name: {"first": v[0], "mean of the last": sum(v[-LAST:]) / len(v[-LAST:]), "of": len(v[-LAST:])}
                     for name, v in values.items() if v},
        "training by block": {str(block): sum(v) / len(v) for block, v in learned.items()},
        "held out": end.get("lm loss"), "held out at": end.get("iteration"),
        "blocks": [*blocks.values()], "steps": end.get("expected refinement steps"),
        "depths": {str(depth): loss for depth, loss in depths.items()},
        "alarms": [f"ALARM at iteration {r['iteration']}: {r['alarm']}" for r in run.of("alarm")[-2:]],
    }  # fmt: skip


def _one(f: dict[str, Any], about: dict[str, Any]) -> list[str]:
    lines = ["trained: (the run's description is not in the file)"]
    if about:
        ranks = f"{about['world size']} rank{'s' if about['world size'] > 1 else ''}"
        lines = [
            f"{'trained' if f['training'] else 'evaluated'}: {f['description']}; parameters held "
            f"{about['parameters held']:,}, unrolled {about['parameters unrolled']:,}; "
            f"{about['tokens per iteration']:,} tokens per iteration on {ranks}",
            *([f"spent: {count(f['tokens'])} tokens, {_flops(f['FLOPs'])} FLOPs, {duration(f['seconds'])}"]
              if f["training"] else []),
        ]  # fmt: skip
    losses = [f"{name} {v['first']:.3f} -> {v['mean of the last']:.3f}" for name, v in f["training"].items()]
    of = max((v["of"] for v in f["training"].values()), default=0)
    if losses:
        lines.append(f"iterations {f['first iteration']} to {f['iteration']}: {', '.join(losses)} (the first logged "
                     f"iteration, and the mean of {of} single iterations, the last logged)")  # fmt: skip
    if f["starts"] > 1:
        lines.append(f"started {f['starts']} times{' (resumed from its checkpoints)' if f['resumed'] else ''}")
    if f["steps"] is not None:
        lines.append(f"expected refinement steps at the halting threshold: {f['steps']:.2f}")
    if f["held out"] is not None:
        lines.append(f"held-out lm loss at iteration {f['held out at']}: {f['held out']:.3f}")
    if len(f["training by block"]) > 1:
        each = ", ".join(f"{block}: {loss:.3f}" for block, loss in f["training by block"].items())
        lines.append(f"training lm loss after each refinement block: {each}")
    if f["blocks"]:
        each = ", ".join(f"{block}: {loss:.3f}" for block, loss in enumerate(f["blocks"], start=1))
        lines.append(f"held-out lm loss after each refinement block: {each}")
    if f["depths"]:
        each = ", ".join(f"{depth}: {loss:.3f}" for depth, loss in f["depths"].items())
        lines.append(f"held-out lm loss at depths: {each}")
    return lines


def _blocks_said(f: dict[str, Any]) -> list[str]:
    """What every further block takes off the held-out loss, in words."""
    gains = [before - after for before, after in zip(f["blocks"], f["blocks"][1:], strict=False)]
    if not gains:
        return []
    added = [f"block {n} {'adds' if gain >= 0 else 'loses'} {abs(gain):.3f}" for n, gain in enumerate(gains, start=2)]
    if len(gains) > 4:
        added = [*added[:2], f"blocks 4 to {len(gains) + 1} add {sum(gains[2:]):.3f}"]
    used = next((n for n in range(len(gains)) if sum(gains[n:]) < NOTHING), len(gains)) + 1
    rest = f"all after block {used} adds nothing" if used <= len(gains) else "depth is used up to the last block"
    return [f"{', '.join(added)} nats: {rest}"]


def _table(figures: Sequence[dict[str, Any]]) -> str:
    lines = [_ROW.format("run", "layers", "passes", "tokens", "FLOPs", "time", "held-out", "by block")]
    for f in figures:
        blocks = [f"{loss:.3f}" for loss in f["blocks"]] or ["-"]
        lines.append(_ROW.format(
            f["run"] if len(f["run"]) <= 24 else f"..{f['run'][-22:]}", f["layers"] or "-", f["passes"] or "-",
            count(f["tokens"]), _flops(f["FLOPs"]), duration(f["seconds"]),
            "-" if f["held out"] is None else f"{f['held out']:.3f}",
            " ".join(blocks if len(blocks) <= 4 else [*blocks[:2], "..", blocks[-1]]),
        ))  # fmt: skip
    return "\n".join(lines)


def _compare(run: Run, f: dict[str, Any], base: Run, b: dict[str, Any]) -> dict[str, Any]:
    """A run beside another: at the same tokens, and at the same FLOPs, as far as both were evaluated."""
    same_layers = (f["layers"], f["width"]) == (b["layers"], b["width"])
    ablation = bool(f["recursive"] and b["recursive"] is False and same_layers)
    tokens, flops = _at_same(run, base, "tokens"), _at_same(run, base, "flops")
    result = {"run": f["run"], "against": b["run"], "ablation": ablation, "same tokens": tokens, "same FLOPs": flops}
    if tokens is None or not f["FLOPs per token"] or not b["FLOPs per token"]:
        return {**result, "said": f"{f['run']} and {b['run']} have no evaluations at common tokens and known FLOPs."}
    # What was spent on each token of the data, which carried steps read several times.
    spends = [x["FLOPs"] / x["tokens"] if x["FLOPs"] and x["tokens"] else x["FLOPs per token"] for x in (f, b)]
    gain, times = tokens["against"] - tokens["run"], spends[0] / spends[1]
    costs_more, spent = times > 1.02, "the same FLOPs" if abs(times - 1) <= 0.02 else f"{times:.3g} times the FLOPs"
    said = f"At the same {count(tokens['at'])} tokens {_places(run, base, 'tokens', tokens)}: "
    said += "the recursion " if ablation else f"{f['run']} "
    if gain >= NOTHING:
        said += f"{'buys' if ablation else 'is better by'} {gain:.3f} nats at {spent}."
    else:
        said += f"is worse by {-gain:.3f} nats" if gain <= -NOTHING else f"changes nothing (less than {NOTHING} nats)"
        said += f" at {spent}{'; it did not earn them' if costs_more else ''}."
    if flops is not None and abs(times - 1) > 0.02:
        said += f" At equal {_flops(flops['at'])} FLOPs {_places(run, base, 'flops', flops)}."
    mine, theirs = (each.of("held-out")[-1]["flops"] for each in (run, base))
    if costs_more and gain >= NOTHING and flops is not None and theirs >= AS_FAR * mine:
        said += f" So it {'earned' if flops['against'] - flops['run'] >= NOTHING else 'did not earn'} them."
    elif costs_more and gain >= NOTHING:
        iterations = round(b["held out at"] * mine / theirs)
        said += f" Whether it earned them, {b['run']} trained for as many (--train-iters {iterations}) would tell."
    return {**result, "FLOPs ratio": times, "gain": gain, "said": said}


def _places(run: Run, base: Run, key: str, same: dict[str, float]) -> str:
    """Where both are. A run that went on had not lowered its learning rate there as at its end, so that it is told."""
    parts = []
    for each, loss in ((run, same["run"]), (base, same["against"])):
        share = same["at"] / each.of("held-out")[-1][key]
        parts.append(f"{each.name} {f'(at {share:.0%} of its way) ' if share < AS_FAR else ''}has {loss:.3f}")
    return " and ".join(parts)


def _at_same(run: Run, base: Run, key: str) -> dict[str, float] | None:
    """Both losses where the one that was evaluated less far ends; between two evaluations, on a line."""
    curves = []
    for each in (run, base):
        held_out = [r for r in each.of("held-out") if key in r and math.isfinite(r.get("lm loss", math.nan))]
        curves.append([(r[key], r["lm loss"]) for r in held_out])
    if not all(curves):
        return None
    where, losses = min(curve[-1][0] for curve in curves), []
    for curve in curves:
        after = next(n for n, (x, _) in enumerate(curve) if x >= where)
        (x0, y0), (x1, y1) = curve[max(after - 1, 0)], curve[after]
        if x0 == x1 and x1 > where:
            return None  # it was first evaluated later
        losses.append(y1 if x0 == x1 else y0 + (y1 - y0) * (where - x0) / (x1 - x0))
    return {"at": where, "run": losses[0], "against": losses[1]}


def _flops(number: float | None) -> str:
    return "-" if number is None else f"{number:.2e}".replace("e+", "e")
