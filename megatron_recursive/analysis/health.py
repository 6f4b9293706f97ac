"""How states move pass by pass on given text, what the heads say of them, and whether the model needs them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.analysis.depth_sweep import Sweep, standard_error
from megatron_recursive.analysis.depth_walk import branches_of
from megatron_recursive.analysis.exit_frontier import left_after
from megatron_recursive.data.progress import steps
from megatron_recursive.hf.model.exits_recursive_gpt import ExitOptions, ExitRule, threshold_of
from megatron_recursive.losses.telemetry import relative_change, token_cosine

BINS = 10  # of a reliability curve
FOLLOWED = 7  # tokens of the first sample whose states are drawn


@torch.no_grad()
def examine(sweep: Sweep) -> dict[str, Any]:
    """What the documented record says of a recursive model; the depths of ``sweep`` are not asked."""
    parts = [_measure(sweep, batch) for batch in steps(sweep.rows.split(sweep.batch_size), "health")]
    found = {name: torch.cat([each[name] for each, _ in parts], -1) for name in parts[0][0]}
    return _record(sweep, found, parts[0][1])


def _measure(sweep: Sweep, batch: Tensor) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Of a batch, what is of each token that counts, [..., tokens], or a sum and its count, [..., 2]; and of tokens of
    its first sample, position -> output states [passes, H]."""
    model, (ids_BS, targets, counts) = sweep.model, sweep.read(batch)
    plan, mask_SB = model.plan, counts.view(ids_BS.shape).T.float()
    # The same plan with one block, loop or pass of the core more, in steps as they are; it branches off behind a pass.
    branches = branches_of(replace(plan, mean_steps=False), [plan.depth, plan.depth + 1])
    shared, deeper = branches[0].shared, branches[-1].plan
    logits, found, path = torch.empty(0), defaultdict[str, list[Tensor]](list), list[Tensor]()
    rules = {exit: ExitRule(each, model.head, lambda _: logits) for exit, each in sweep.exits.items()}

    def loss(states: Any) -> Tensor:
        said = model.logits(model.output(states)).float()
        return F.cross_entropy(said[counts], targets[counts], reduction="none")

    began = states = branching = model.begin(ids_BS)
    for each in plan.passes:
        before, states = states, model.advance(states, plan, each.index, each.index + 1)
        branching = states if each.index < shared else branching
        was_SBH, now_SBH = (model.state(at, each.target).transpose(0, 1) for at in (before, states))
        found["change"].append(relative_change(was_SBH, now_SBH, mask_SB, None))
        found["cosine"].append(token_cosine(now_SBH, mask_SB, None))
        if each.target != "output":
            continue
        output = model.output(states)[counts]
        logits, read = model.logits(output).float(), model.read(output)
        found["loss"].append(F.cross_entropy(logits, targets[counts], reduction="none"))
        found["choice"].append(logits.argmax(-1))
        if each.index < plan.parts[-1].stop:
            path.append(now_SBH[:, 0].cpu())
        if each.halt_weight:
            found["head"].append(torch.sigmoid(model.head(read).float()))
        for exit, rule in rules.items() if plan.is_block_end(each) else ():
            if each.block + 1 < rule.options.max_blocks:
                found[exit].append(rule.signal(output, read).float())
    for left in (2**n for n in range(plan.depth.bit_length()) if 2**n < plan.depth):
        found["reset"].append(loss(model.advance(model.reset(states, began), plan, plan.parts[-left].start, None)))
    if not model.has_own_passes:
        further = model.advance(branching, deeper, shared, None)
        was_SBH, now_SBH = (model.state(at, "output").transpose(0, 1) for at in (states, further))
        found["distance"].append(relative_change(was_SBH, now_SBH, mask_SB, None))
        found["further"].append(loss(further))
    length = ids_BS.shape[1]  # the first token is left out: as a sink of attention it is often far from all others
    places = torch.linspace(min(1, length - 2), length - 1, min(FOLLOWED, length)).long().tolist()
    measured = {name: torch.stack(each).cpu() for name, each in found.items()} | {"target": targets[counts].cpu()}
    return measured, {place: torch.stack(path)[:, place] for place in places}


def projected(path_PNH: Tensor) -> tuple[Tensor, list[float]]:
    """States on their two principal axes [passes, tokens, 2], and what share of their variance each has."""
    flat = path_PNH.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()  # else a sign is anyone's
    shares = sizes.square() / sizes.square().sum().clamp(min=1e-30)
    return (flat @ axes.T).unflatten(0, path_PNH.shape[:2]), shares[:2].tolist()


def calibration(probability: Tensor, right: Tensor) -> dict[str, Any]:
    """Reliability by equal bins of probability, those without tokens left out; and the mean distance from it."""
    at, probability = (probability * BINS).long().clamp(max=BINS - 1), probability.double()
    bins = [{"from": n / BINS, "to": (n + 1) / BINS, "tokens": int((at == n).sum()),
             "probability": _mean(probability[at == n]), "right": _mean(right[at == n])}
            for n in at.unique().tolist()]  # fmt: skip
    return {"bins": bins, "expected_error": sum(
        each["tokens"] * abs(each["probability"] - each["right"]) for each in bins) / len(at)}  # fmt: skip


def _record(sweep: Sweep, found: dict[str, Tensor], paths: dict[int, Tensor]) -> dict[str, Any]:
    plan, choice, right = sweep.model.plan, found["choice"], found["choice"] == found["target"]
    reads = [each for each in plan.passes if each.target == "output"]
    passes: list[dict[str, Any]] = [
        {"pass": each.index + 1, "block": each.block + 1, "stack": each.stack, "target": each.target,
         "ends_block": plan.is_block_end(each), "change": change, "token_cosine": cosine}
        for each, change, cosine in zip(plan.passes, *map(_ratios, (found["change"], found["cosine"])), strict=True)
    ]  # fmt: skip
    for row, each in enumerate(reads):
        passes[each.index] |= {"loss": _mean(found["loss"][row]), "accuracy": _mean(right[row]),
                               "agrees": _mean(choice[row] == choice[-1])}  # fmt: skip
    record: dict[str, Any] = {
        "family": plan.family, "depth": plan.depth, "tokens": right.shape[1], "loss": _mean(found["loss"][-1]),
        "accuracy": _mean(right[-1]), "passes": passes,
    }  # fmt: skip

    def tried(loss: Tensor) -> dict[str, float | None]:
        return {"loss": _mean(loss), "standard_error": standard_error(loss - found["loss"][-1])}

    if "further" in found:
        record["one_more"] = {"distance": _ratios(found["distance"])[0], **tried(found["further"][0])}
    if "reset" in found:
        record["reset"] = [{"remaining": 2**n, **tried(loss)} for n, loss in enumerate(found["reset"])]
    if sweep.exits:
        ends = right[[row for row, each in enumerate(reads) if plan.is_block_end(each)]]
        record["exits"] = {exit: _left(options, found[exit], ends) for exit, options in sweep.exits.items()}
    if "head" in found:
        rows = [row for row, each in enumerate(reads) if each.halt_weight]
        goal = sweep.model.model.config.recursion.get("halt_target", "correct")
        said = right[rows] if goal == "correct" else choice[rows] == choice[-1]
        record["calibration"] = {"halt_target": goal, **calibration(found["head"].flatten(), said.flatten())}
    points, shares = projected(torch.stack(list(paths.values()), 1))
    tokens = [{"position": at, "points": points[:, n].tolist()} for n, at in enumerate(paths)]
    record["trajectories"] = {"variance": shares, "tokens": tokens}
    reasons = {
        "one_more": "each pass has adapters of its own",
        "reset": "the depth is 1",
        "exits": "not two refinement blocks that are alike",
        "calibration": "the exit gate says when to leave, not what is right" if plan.exit_gate else "no halting head",
    }
    return record | {"left_out": {name: why for name, why in reasons.items() if name not in record}}


def _left(options: ExitOptions, signal: Tensor, right: Tensor) -> dict[str, Any]:
    """By an exit at the model's own threshold: how many tokens leave after each block, and how many are right there."""
    threshold = getattr(options, threshold_of(options.exit))
    taken = left_after(options.exit, signal, threshold)
    there, early = right.gather(0, taken[None] - 1)[0], taken < options.max_blocks
    return {
        "threshold": threshold, "mean_depth": _mean(taken), "accuracy": _mean(there),
        "early": {"share": _mean(early), "accuracy": _mean(there[early]),
                  "accuracy_after_all": _mean(right[-1][early]), "accuracy_of_others": _mean(there[~early])},
        "blocks": [{"block": n, "share": _mean(taken == n), "accuracy": _mean(there[taken == n])}
                   for n in range(1, options.max_blocks + 1)],
    }  # fmt: skip


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


def _ratios(pairs: Tensor) -> list[float | None]:
    """Of a telemetry's sums and counts, [rows, 2 batches]."""
    sums = pairs.double().unflatten(1, (-1, 2)).sum(1).tolist()
    return [total / count if count else None for total, count in sums]
