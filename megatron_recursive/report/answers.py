"""The three answers of a page, in words, from figures and by a rule that it tells."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from megatron_recursive.figures import NOTHING, count, perplexity
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.report.subjects import Subject

LITTLE = 0.01  # nats that leaving early may cost
NOISE = "Within the noise"
NOISE_RULE = f"{NOISE}: the difference is below two of its standard errors, where these are above {NOTHING} nats."


class Answer(NamedTuple):
    question: str
    said: str
    tone: str  # good, bad or open
    lines: list[str]
    rule: str


def losses_by_depth(subject: Subject) -> tuple[list[dict[str, Any]], dict[str, Any] | None, str]:
    """Depths with their loss, which of them is the trained one, and where they are from."""
    figures, swept = subject.figures, subject.found.get("sweep")
    losses = figures.get("depths") or dict(enumerate(figures.get("blocks", ()), start=1))
    trained = subject.plan.depth if subject.plan else len(figures.get("blocks", ()))
    by_depth = {int(depth): loss for depth, loss in losses.items()}
    if by_depth and figures.get("held out") is not None:
        by_depth.setdefault(trained, figures["held out"])
    rows = [{"depth": depth, "loss": by_depth[depth]} for depth in sorted(by_depth)]
    source = "the last held-out evaluation of the training"
    if swept:
        text = swept["text"] if isinstance(swept["text"], str) else " ".join(swept["text"])
        rows, trained, source = swept["depths"], swept["trained_depth"], f"sweep: {swept['tokens']:,} tokens of {text}"
    return rows, next((row for row in rows if row["depth"] == trained), None), source


def answers(subject: Subject) -> list[Answer]:
    """Whether the recursion is used, what depth buys, what it costs."""
    rows, own, source = losses_by_depth(subject)
    first = rows[0] if own and rows[0]["depth"] < own["depth"] else None
    return [_use(subject, first, own), _gain(subject, rows, first, own, source), _cost(subject, own)]


def _is_noise(rise: float, measured: Any) -> bool:
    """Of a loss against another on the same tokens; records of old, and evaluations, do not tell their error."""
    error = measured.get("standard_error") or 0.0
    return bool(abs(rise) < 2 * error > NOTHING)


def _use(subject: Subject, first: Any, own: Any) -> Answer:
    health, rises, figures = subject.found.get("health", {}), dict[str, tuple[float, Any]](), subject.figures
    if first:
        rises[f"Stopping at depth {first['depth']}, not {own['depth']},"] = first["loss"] - own["loss"], first
    is_same = first is not None and first["depth"] == 1 and subject.plan is not None and _starts_over(subject.plan)
    for each in () if is_same else health.get("reset", ())[:1]:
        rises["Resetting the state before the last step"] = each["loss"] - health["loss"], each
    known = [rise for rise, each in rises.values() if not _is_noise(rise, each)]
    least, (said, tone) = min(known, default=math.inf), (_unknown(subject), "open")
    if least < NOTHING:
        said, tone = "No" if least > -NOTHING else "It does harm", "bad"
    elif rises:
        said, tone = ("Yes", "good") if len(known) == len(rises) else (NOISE, "open")
    lines = [f"{what} {'raises' if rise > 0 else 'lowers'} the loss by {abs(rise):.3f} nats a token{_error(each)}."
             for what, (rise, each) in rises.items()]  # fmt: skip
    for alarm in figures.get("alarms", [])[-1:]:
        lines.append(f"Its training gave an {alarm.partition(':')[0].lower()} of {figures['iteration']}.")
    rule = f"Yes: each raises the loss by at least {NOTHING} nats, the threshold of the training's alarm. It does "
    rule += f"harm: one lowers it by as much. No: otherwise. {NOISE_RULE}"
    return Answer("Is the recursion used?", said, tone, lines, rule if rises else "")


def _starts_over(plan: RecursionPlan) -> bool:
    """Whether the last step from a state that was reset is all that a model of depth 1 does."""
    last = plan.passes[plan.parts[-1].start :]
    alone = plan.with_blocks(1).passes[-len(last) :]
    words = ("stack", "target", "reads", "combine", "step", "move")
    return all(getattr(a, word) == getattr(b, word) for a, b in zip(last, alone, strict=True) for word in words)


def _error(measured: Any) -> str:
    error = measured.get("standard_error")
    return "" if error is None else f" (standard error {error:.4f})"


def _unknown(subject: Subject) -> str:
    return "There is none" if subject.is_plain else "Not measured"


def _gain(subject: Subject, rows: list[Any], first: Any, own: Any, source: str) -> Answer:
    question, loss = "What does depth buy?", own["loss"] if own else subject.figures.get("held out")
    if not first or loss is None:
        lines = [] if loss is None else [f"The held-out loss is {loss:.3f} nats a token."]
        return Answer(question, _unknown(subject), "open", lines, "")
    gain, best = first["loss"] - loss, min(rows, key=lambda row: float(row["loss"]))
    said = "Nothing" if abs(gain) < NOTHING else f"{'It costs ' * (gain < 0)}{abs(gain):.3f} nats a token"
    said, tone = (NOISE, "open") if _is_noise(gain, first) else (said, "good" if gain >= NOTHING else "bad")
    lines = [f"Loss {first['loss']:.3f} at depth {first['depth']}, {loss:.3f} at {own['depth']}; perplexity "
             f"{perplexity(first['loss']):.4g} to {perplexity(loss):.4g}."]  # fmt: skip
    if "accuracy" in own:
        lines.append(f"Next tokens that are right: {first['accuracy']:.1%} to {own['accuracy']:.1%}.")
    deeper = [row for row in rows if row["depth"] > own["depth"]][:1]
    if loss - best["loss"] >= NOTHING and not _is_noise(loss - best["loss"], best):
        lines.append(f"The best depth is {best['depth']}: {best['loss']:.3f}.")
    else:
        lines += [f"Deeper than trained does not help: {row['loss']:.3f} at depth {row['depth']}." for row in deeper]
    return Answer(question, said, tone, lines, "The loss at the trained depth below that at the lowest that was "
                  f"measured ({source}). {NOISE_RULE}")  # fmt: skip


def _cost(subject: Subject, own: Any) -> Answer:
    question, counted, figures = "What does it cost?", subject.found.get("count"), subject.figures
    if counted is None:
        passes = subject.plan.num_passes if subject.plan else 0
        said = f"{passes} pass{'es' * (passes > 1)}" if passes else "Not counted"
        lines = [f"Training took {count(figures['FLOPs'])} FLOPs."] if figures.get("FLOPs") else []
        return Answer(question, said, "open", lines, "")
    flops, held = counted["flops_per_token"], counted["parameters"]["held"]["total"]
    training, times = (flops[each] / flops[f"plain_{each}"] for each in ("training", "inference"))
    lines = [f"A new token: {count(flops['inference'])} FLOPs, {count(flops['plain_inference'])} with the layers once.",
             f"A token of training: {count(flops['training'])} FLOPs, {training:.2f} times.",
             f"{held:,} parameters; {counted['cache_bytes_per_token']:,} bytes of cache a token."]  # fmt: skip
    exits = subject.found.get("sweep", {}).get("exits", {})
    cheap = [(point["flops_per_token"], exit, point["loss"] - own["loss"]) for exit, each in exits.items()
             for point in each["points"] if point["loss"] <= own["loss"] + LITTLE]  # fmt: skip
    if cheap and (saved := 1 - min(cheap)[0] / own["flops_per_token"]) >= 0.005:
        _, exit, more = min(cheap)
        lines.append(f"Leaving early ({exit}) would save {saved:.0%} of a new token for {more:+.3f} nats.")
    rule = f"FLOPs of a new token in sequences of {counted['model']['sequence_length']:,}, through all passes and the "
    rule += "vocabulary, by those of the same layers applied once; computed. Leaving early: the cheapest way that "
    rule += f"costs {LITTLE} nats at most, estimated."
    return Answer(question, f"{times:.2f} times the FLOPs", "open", lines, rule)
