"""What held-out text says of a model at several depths, from one walk: losses, settled answers, what exits would see.

Batches are kept as files until the record is written, so that a command that was killed goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_recursive.accounting import ModelShape, inference_flops
from megatron_recursive.analysis.depth_walk import Branch, branches_of, passes_run, walk
from megatron_recursive.data.files import replacing
from megatron_recursive.data.progress import steps
from megatron_recursive.errors import UserError
from megatron_recursive.figures import perplexity
from megatron_recursive.hf.convert.configs import family_of, read_config
from megatron_recursive.hf.model.exits_recursive_gpt import EXITS, ExitOptions, ExitRule
from megatron_recursive.plan import RecursionPlan

FREQUENCIES = (1, 10, 100, 1000)  # of a token in the text: where bands of settled answers begin


@dataclass(frozen=True)
class Sweep:
    """What is asked of one model.

    Attributes:
        model: as :mod:`depth_walk` walks it. rows: [N, S + 1], each with the token behind it.
        first_answer: as ``--answer-tokens`` of the training.

    Raises:
        UserError: no token counts, or passes of the asked depths have no adapters.
    """

    model: Any
    depths: Sequence[int]
    rows: Tensor
    batch_size: int
    first_answer: int | None = None

    def __post_init__(self) -> None:
        if self.model.has_own_passes and set(self.depths) - {self.model.plan.depth}:
            raise UserError("The model has adapters for each of its passes, and none for those of another depth; give "
                            f"--depths {self.model.plan.depth}.")  # fmt: skip
        if self.first_answer is not None and not (self.rows[:, 1:] >= self.first_answer).any():
            raise UserError(f"--answer-tokens {self.first_answer} leaves no token of --text to be judged; lower it, or "
                            "give other text.")  # fmt: skip

    @cached_property
    def exits(self) -> dict[str, ExitOptions]:
        """Those that the model can leave by, as generation would."""
        found: dict[str, ExitOptions] = {}
        for exit in EXITS if hasattr(self.model, "head") else ():
            try:
                options = ExitOptions.make(self.model.model.config, exit)
            except ValueError:
                continue
            if options is not None and options.max_blocks > 1:
                found[exit] = options
        return found

    @cached_property
    def blocks(self) -> int:
        """After which all have left, by any exit."""
        return max((each.max_blocks for each in self.exits.values()), default=0)

    @cached_property
    def asked(self) -> list[Branch]:
        return branches_of(self.model.plan, self.depths)

    @cached_property
    def measured(self) -> list[Branch]:
        """The asked depths, and those that exits need."""
        return branches_of(self.model.plan, [*self.depths, *range(1, self.blocks + 1)])

    @cached_property
    def row_of(self) -> dict[int, int]:
        """Depth -> its row in what :func:`run` finds."""
        return {depth: row for row, depth in enumerate(sorted(each.depth for each in self.measured))}

    @cached_property
    def shape(self) -> ModelShape | None:
        """For FLOPs; None of a model of transformers that no table knows."""
        config, where = self.model.model.config, "The model"
        try:
            arch = read_config(family_of(config.to_dict(), where), config, where)
        except UserError:
            return None
        return arch.shape(self.rows.shape[1] - 1, config.vocab_size)

    def flops(self, plan: RecursionPlan) -> float | None:
        """Of a token that is read."""
        return None if self.shape is None else inference_flops(self.shape, plan)

    def read(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model reads [B, S], what it is to say, and which tokens count [B * S]."""
        ids_BS, targets = batch[:, :-1], batch[:, 1:].flatten()
        if self.first_answer is None:
            return ids_BS, targets, torch.ones_like(targets, dtype=torch.bool)
        return ids_BS.masked_fill(ids_BS >= self.first_answer, 0), targets, targets >= self.first_answer


@torch.no_grad()
def run(sweep: Sweep, folder: Path, source: str) -> dict[str, Tensor]:
    """Of every token that counts: ``loss`` and ``choice`` [depths, tokens], ``target``, ``place``, and under an exit's
    name what it compares with its threshold after each block but the last; and ``sharing``, of :func:`_sharing`.

    ``folder`` keeps batches; those of the same ``source`` and question are taken from it.
    """
    question = [source, sweep.depths, sweep.batch_size, sweep.first_answer]
    key = hashlib.sha256(repr(question).encode() + sweep.rows.cpu().numpy().tobytes()).hexdigest()[:16]
    batches = sweep.rows.split(sweep.batch_size)
    files = [folder / f"{key}-{at:05d}.safetensors" for at in range(len(batches))]
    missing = [(file, batch) for file, batch in zip(files, batches, strict=True) if not file.is_file()]
    for file, batch in steps(missing, "sweep", done=len(files) - len(missing)):
        measured = _measure(sweep, batch)
        if file == files[0]:
            measured["sharing"] = _sharing(sweep, batch)
        with replacing(file) as (partial,):
            save_file(measured, partial)
    parts = [load_file(file) for file in files]
    sharing = parts[0].pop("sharing")
    return {name: torch.cat([each[name] for each in parts], -1) for name in parts[0]} | {"sharing": sharing}


def _measure(sweep: Sweep, batch: Tensor) -> dict[str, Tensor]:
    model, (ids_BS, targets, counts) = sweep.model, sweep.read(batch)
    logits = torch.empty(0)
    rules = {exit: ExitRule(each, model.head, lambda _: logits) for exit, each in sweep.exits.items()}
    said: dict[int, dict[str, Tensor]] = {}
    signals: dict[str, list[Tensor]] = {exit: [] for exit in rules}
    for depth, states in walk(model, ids_BS, sweep.measured):
        output = model.output(states)
        logits = model.logits(output).float()
        said[depth] = {"loss": F.cross_entropy(logits, targets, reduction="none"), "choice": logits.argmax(-1)}
        for exit, rule in rules.items() if depth < sweep.blocks else ():
            signals[exit].append(rule.signal(output, model.read(output)).float())
    found = {name: torch.stack([said[depth][name] for depth in sweep.row_of]) for name in ("loss", "choice")}
    found |= {exit: torch.stack(each) for exit, each in signals.items()}
    found |= {"target": targets, "place": torch.arange(ids_BS.shape[1], device=targets.device).repeat(len(ids_BS))}
    return {name: value[..., counts].cpu().contiguous() for name, value in found.items()}


def _sharing(sweep: Sweep, batch: Tensor) -> Tensor:
    """Seconds of one walk over a batch, of a walk for each depth, and the largest difference between their losses."""
    model, (ids_BS, targets, _) = sweep.model, sweep.read(batch)

    def losses(branches: list[Branch]) -> dict[int, Tensor]:
        return {depth: F.cross_entropy(model.logits(model.output(states)).float(), targets, reduction="none").cpu()
                for depth, states in walk(model, ids_BS, branches)}  # fmt: skip

    times = [time.perf_counter()]
    together = losses(sweep.asked)
    times.append(time.perf_counter())
    alone = [losses([each._replace(shared=each.plan.num_passes)])[each.depth] for each in sweep.asked]
    times.append(time.perf_counter())
    difference = max(float((a - together[each.depth]).abs().max()) for a, each in zip(alone, sweep.asked, strict=True))
    return torch.tensor([times[1] - times[0], times[2] - times[1], difference], dtype=torch.float64)


def record_of(sweep: Sweep, found: dict[str, Tensor]) -> dict[str, Any]:
    """What the documented record says of one model, without its exits; the trained depth is among those asked."""
    plan, asked = sweep.model.plan, sorted(sweep.asked)
    rows = [sweep.row_of[each.depth] for each in asked]
    loss, own = found["loss"].double(), sweep.row_of[plan.depth]
    losses, errors = loss.mean(1)[rows].tolist(), [standard_error(loss[row] - loss[own]) for row in rows]
    right = (found["choice"] == found["target"]).double().mean(1)[rows].tolist()
    together, apart, difference = found["sharing"].tolist()
    return {
        "family": plan.family, "trained_depth": 1 if plan.is_plain else plan.depth, "tokens": len(found["target"]),
        "depths": [
            {"depth": each.depth, "passes": each.plan.num_passes, "loss": loss, "standard_error": error,
             "perplexity": perplexity(loss), "accuracy": accuracy, "flops_per_token": sweep.flops(each.plan)}
            for each, loss, error, accuracy in zip(asked, losses, errors, right, strict=True)
        ],
        "sharing": {
            "passes": passes_run(sweep.asked), "passes_separately": sum(each.plan.num_passes for each in asked),
            "seconds": together, "seconds_separately": apart, "largest_difference": difference,
            "alone": [each.depth for each in asked if 2 * each.shared < each.plan.num_passes],
        },
        "settled": settled([each.depth for each in asked], found["choice"][rows], found["target"], found["place"]),
    }  # fmt: skip


def standard_error(differences: Tensor) -> float | None:
    """Of their mean, tokens [N] taken as independent; None of a single one."""
    return float(differences.double().std() / len(differences) ** 0.5) if len(differences) > 1 else None


def settled(depths: Sequence[int], choice: Tensor, target: Tensor, place: Tensor) -> dict[str, Any]:
    """From which of the depths on a token's answer [depths, tokens] is that of the deepest: shares, means by band."""
    stays = (choice == choice[-1]).int().flip(0).cummin(0).values.flip(0)
    first, frequency, length = torch.tensor(depths)[stays.argmax(0)], target.bincount()[target], int(place.max()) + 1

    def bands(value: Tensor, bounds: Sequence[int]) -> list[dict[str, float]]:
        within = {pair: first[(value >= pair[0]) & (value < pair[1])] for pair in zip(bounds, bounds[1:], strict=False)}
        return [{"from": start, "to": stop - 1, "tokens": len(of), "mean_depth": float(of.double().mean())}
                for (start, stop), of in within.items() if len(of)]  # fmt: skip

    return {
        "mean_depth": float(first.double().mean()),
        "shares": [{"depth": depth, "share": float((first == depth).double().mean())} for depth in depths],
        "by_frequency": bands(frequency, [*FREQUENCIES, len(first) + 1]),
        "by_position": bands(place, sorted({length * n // 8 for n in range(9)})),
    }
