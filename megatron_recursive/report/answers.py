"""The three answers of a page, in words, from figures and by a rule that it tells."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from megatron_recursive.plots.run_summary import NOTHING
from megatron_recursive.report.subjects import Subject

LITTLE = 0.01  # nats that leaving early may cost


class Answer(NamedTuple):
    question: str
    said: str
    tone: str  # good, bad or open
    lines: list[str]
    rule: str


def losses_by_depth(subject: Subject) -> tuple[list[dict[str, Any]], int, str]:
    """Depths with their loss, which of them is the trained one, and where they are from."""
    figures, swept = subject.figures, subject.found.get("sweep")
    if swept:
        return swept["depths"], swept["trained_depth"], f"the depth sweep, {swept['tokens']:,} tokens of held-out text"
    losses = figures.get("depths") or dict(enumerate(figures.get("blocks", ()), start=1))
    rows = [{"depth": int(depth), "loss": loss} for depth, loss in losses.items()]
    return rows, subject.plan.depth if subject.plan else 1, "the last held-out evaluation of the training"


def answers(subject: Subject) -> list[Answer]:
    """Whether the recursion is used, what depth buys, what it costs."""
    rows, trained, source = losses_by_depth(subject)
    own = next((row for row in rows if row["depth"] == trained), None)
    return [_use(subject, rows, own), _gain(subject, rows, own, source), _cost(subject, own)]


def _use(subject: Subject, rows: list[dict[str, Any]], own: dict[str, Any] | None) -> Answer:
    health, differences = subject.found.get("health", {}), dict[str, float]()
    if own and own is not rows[0]:
        differences[f"Stopping at depth {rows[0]['depth']} of {own['depth']}"] = rows[0]["loss"] - own["loss"]
    for each in health.get("reset", ())[:1]:
        differences["Resetting the state before the last step"] = each["loss"] - health["loss"]
    least, plain = min(differences.values(), default=math.nan), subject.plan is not None and subject.plan.is_plain
    said, tone = ("There is none" if plain else "Not measured"), "open"
    if differences:
        said, tone = (("Yes", "good") if least >= NOTHING else
                      ("No", "bad") if least > -NOTHING else ("It does harm", "bad"))  # fmt: skip
    lines = [f"{what} changes the loss by {value:+.3f} nats a token." for what, value in differences.items()]
    lines += [each.split(";")[0] + "." for each in subject.figures.get("alarms", ())[-1:]]
    return Answer("Is the recursion used?", said, tone, lines, f"Yes: every such change is a rise of at least {NOTHING} "
                  "nats, the threshold of the training's alarm. Harm: one is a fall of as much. No: else.")  # fmt: skip


def _gain(subject: Subject, rows: list[dict[str, Any]], own: dict[str, Any] | None, source: str) -> Answer:
    if own is None or own is rows[0]:
        loss = own["loss"] if own else subject.figures.get("held out")
        lines = [] if loss is None else [f"The held-out loss is {loss:.3f} nats a token."]
        return Answer("What does depth buy?", "One depth was measured" if lines else "Not measured", "open", lines, "")
    first, best = rows[0], min(rows, key=lambda row: float(row["loss"]))
    gain, tone = first["loss"] - own["loss"], "good" if first["loss"] - own["loss"] >= NOTHING else "bad"
    said = "Nothing" if abs(gain) < NOTHING else f"{gain:.3f} nats a token" if gain > 0 else f"A loss, {-gain:.3f} nats"
    line = f"Loss {first['loss']:.3f} at depth {first['depth']}, {own['loss']:.3f} at {own['depth']} (perplexity "
    line += f"{math.exp(first['loss']):.4g} to {math.exp(own['loss']):.4g}"
    line += f"; right next tokens {first['accuracy']:.1%} to {own['accuracy']:.1%})." if "accuracy" in own else ")."
    deeper = next((row for row in rows if row["depth"] > own["depth"]), None)
    lines = [line]
    if own["loss"] - best["loss"] >= NOTHING:
        lines.append(f"The best depth is {best['depth']}, with {best['loss']:.3f}.")
    elif deeper:
        lines.append(f"Going deeper than trained does not help: {deeper['loss']:.3f} at depth {deeper['depth']}.")
    return Answer("What does depth buy?", said, tone, lines, f"The loss of the trained depth below that of the "
                  f"shallowest that was measured, from {source}.")  # fmt: skip


def _cost(subject: Subject, own: dict[str, Any] | None) -> Answer:
    counted, question, spent = subject.found.get("count"), "What does it cost?", subject.figures.get("FLOPs per token")
    if counted is None:
        passes = f"{subject.plan.num_passes} passes through the layers" if subject.plan else "Not counted"
        return Answer(question, passes, "open", [f"Training: {_flops(spent)} a token."] if spent else [], "")
    flops, sizes = counted["flops_per_token"], counted["parameters"]
    lines = [f"A new token takes {_flops(flops['inference'])}; its layers once, {_flops(flops['plain_inference'])}.",
             f"A token of training {_flops(flops['training'])}: {flops['training'] / flops['plain_training']:.2f} times.",
             f"{sizes['held']['total']:,} parameters; {counted['cache_bytes_per_token']:,} bytes of cache a token."]  # fmt: skip
    exits = subject.found.get("sweep", {}).get("exits", {})
    cheap = [(point["flops_per_token"], exit, point["loss"]) for exit, each in exits.items() for point in each["points"]
             if own and point["loss"] <= own["loss"] + LITTLE]  # fmt: skip
    if own and cheap and (saved := 1 - min(cheap)[0] / own["flops_per_token"]) >= 0.005:
        _, exit, loss = min(cheap)
        lines.append(f"Leaving early ({exit}) would save {saved:.0%} of a new token for {loss - own['loss']:+.3f} nats.")
    return Answer(question, f"{flops['inference'] / flops['plain_inference']:.2f} times the FLOPs", "open", lines,
                  "FLOPs of a new token through all passes and the vocabulary, by those of the same layers applied once; "
                  f"computed. Leaving early: the cheapest way that costs at most {LITTLE} nats, estimated.")  # fmt: skip


def _flops(number: float) -> str:
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if number >= s), (1.0, ""))
    return f"{number / size:.3g} {unit}FLOPs"
