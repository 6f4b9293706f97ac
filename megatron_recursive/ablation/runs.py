"""The runs of an ablation: the words of each, how long it trains, what came out of it, and which are due."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_recursive.ablation.config import Ablation, Arm
from megatron_recursive.command_line import PROGRAM
from megatron_recursive.errors import UserError
from megatron_recursive.figures import blocks_of
from megatron_recursive.plots.runs import FILE, read_runs

DESCRIBE = (sys.executable, "-m", "megatron_recursive.training.describe")
SAVES = 5  # of a run on its way, unless its flags say --save-interval
TRIES = 12  # how often FLOPs are counted, each time at other iterations
_AT = re.compile(rb'"iteration": (\d+)')


EVALUATED = "on the first samples"  # another word where evaluations read others: losses would not compare


@dataclass(frozen=True)
class PlannedRun:
    """One training of an ablation. Its folder's name has a hash of its flags, its data and its donors: with others it
    is another run."""

    arm: Arm
    rate: float
    seed: int
    iterations: int
    flops: float
    folder: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.arm.name}, lr {self.rate:g}, seed {self.seed}"

    def share(self) -> float:
        """How much of it is trained, by the end of its metrics."""
        file = self.folder / FILE
        found = _AT.findall(file.read_bytes()[-16384:]) if file.is_file() else []
        return min(int(found[-1]) / self.iterations, 1.0) if found else 0.0

    def result(self) -> dict[str, Any] | None:
        """What it came to, in the words of results.json; None before its final evaluation."""
        if not (self.folder / FILE).is_file():
            return None
        (run,), saved = read_runs([self.folder / FILE]), self.folder / "run.json"  # of its last checkpoint
        final = next((r for r in run.of("held-out") if r["iteration"] == self.iterations and "lm loss" in r), None)
        return final and {
            "arm": self.arm.name, "lr": self.rate, "seed": self.seed, "folder": str(self.folder),
            "command": shlex.join([PROGRAM, *self.words]), "iterations": self.iterations, "tokens": final.get("tokens"),
            "commit": json.loads(saved.read_text())["commit"] if saved.is_file() else None, "FLOPs": self.flops,
            "seconds": final.get("elapsed"), "loss": final["lm loss"],
            "blocks": [*blocks_of(final).values()],
            "token cosine": final.get("token cosine"), "alarms": [r["alarm"] for r in run.of("alarm")],
            "held out": {k: v for k, v in final.items() if k not in ("kind", "iteration", "time", "elapsed", "flops")},
        }  # fmt: skip


@dataclass
class Study:
    """An ablation under way.

    Attributes:
        facts: arm -> what training says of it (``training/describe.py``).
        results: of the runs that are done; failures: a sentence about each of those that failed.
        unjudged: the failures that say nothing of their rate, such as a signal, memory or a full disk: before these are
            done an arm has no best.
    """

    ablation: Ablation
    facts: Mapping[str, Mapping[str, Any]]
    results: dict[PlannedRun, dict[str, Any]] = field(default_factory=dict)
    failures: dict[PlannedRun, str] = field(default_factory=dict)
    unjudged: set[PlannedRun] = field(default_factory=set)

    def iterations(self, arm: Arm) -> int:
        """So many that the arm spends the tokens, or the training FLOPs, of the reference."""
        return int(self.facts[arm.name]["iterations"])

    def run(self, arm: Arm, rate: float, seed: int) -> PlannedRun:
        iterations, facts = self.iterations(arm), self.facts[arm.name]
        flags, slug = _flags(arm, rate, seed, iterations), re.sub(r"\W+", "-", arm.name).strip("-").lower()
        asked = [arm.name, arm.processes, flags, facts["plan"], facts["data"], EVALUATED]
        asked += [facts["donors"]] * bool(facts["donors"])  # without them the results of earlier versions stay
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        folder = self.ablation.output / "runs" / slug / f"lr{rate:g}_seed{seed}_{digest}"
        words = ["pretrain", *(["--nproc-per-node", str(arm.processes)] if arm.processes > 1 else [])]
        # Two runs that wrote one cache would read each other's half files.
        words += ["--data-cache-path", f"{folder}/cache", *flags, "--save", f"{folder}", "--load", f"{folder}"]
        flops = iterations * facts["tokens per iteration"] * facts["FLOPs per token"]
        return PlannedRun(arm, rate, seed, iterations, flops, folder, tuple(words))

    def grid(self, arm: Arm) -> list[PlannedRun]:
        """All rates with the first seed."""
        return [self.run(arm, rate, self.ablation.seeds[0]) for rate in arm.rates]

    def best(self, arm: Arm) -> float | None:
        """The rate of the lowest loss, once all of several have ended, or failed for their rate."""
        grid, ended = self.grid(arm), self.results.keys() | self.failures.keys() - self.unjudged
        losses = {run.rate: self.results[run]["loss"] for run in grid if run in self.results}
        losses = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if len(grid) > 1 and (not losses or not ended >= set(grid)):
            return None
        return min(losses, key=lambda rate: losses[rate]) if losses else arm.rates[0]

    def known(self) -> list[PlannedRun]:
        """The grids, then the other seeds at the best rates that are known, seed by seed."""
        arms, best = self.ablation.arms, {arm: self.best(arm) for arm in self.ablation.arms}
        return [run for arm in arms for run in self.grid(arm)] + [
            self.run(arm, rate, seed) for seed in self.ablation.seeds[1:] for arm, rate in best.items() if rate
        ]

    def due(self) -> list[PlannedRun]:
        return [run for run in self.known() if run not in self.results and run not in self.failures]

    def read(self) -> None:
        """Take in what is done already: first of the grids, from which the others follow."""
        for _ in range(2):
            self.results |= {run: result for run in self.due() if (result := run.result()) is not None}

    def size(self) -> tuple[int, float]:
        """How many runs there will be, and the FLOPs of all."""
        each = [(len(arm.rates) + len(self.ablation.seeds) - 1, self.grid(arm)[0].flops) for arm in self.ablation.arms]
        return sum(number for number, _ in each), sum(number * flops for number, flops in each)

    def spent(self) -> float:
        """FLOPs of what has ended, and of what is on its way."""
        due = set(self.due())
        return sum(run.flops * (run.share() if run in due else 1.0) for run in self.known())


def _flags(arm: Arm, rate: float, seed: int, iterations: int) -> list[str]:
    """A later flag wins: the arm's over what serves where it gives none."""
    return ["--min-lr", f"{rate / 10:g}", "--save-interval", str(math.ceil(iterations / SAVES)), *arm.flags,
            "--lr", f"{rate:g}", "--seed", str(seed), "--train-iters", str(iterations)]  # fmt: skip


def facts_of(ablation: Ablation) -> dict[str, dict[str, Any]]:
    """Arm -> what training says of it, at its own iterations; a UserError names an arm whose flags it refuses.

    What a step costs may go by iterations, so that they are looked for until they stay.
    """
    told: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in ablation.arms}
    due = dict.fromkeys(ablation.arms, ablation.iterations)
    for _ in range(TRIES):
        for name, facts in _described(ablation, due).items():
            told[name][facts["iterations"]] = facts
        whole = _cost(ablation, told[ablation.reference][ablation.iterations])
        spent = {name: {n: _cost(ablation, f) / whole for n, f in each.items()} for name, each in told.items()}
        due = {arm: n for arm in ablation.arms if (n := _nearer(spent[arm.name])) not in spent[arm.name]}
        if not due:
            break
    return {name: each[_best(spent[name])] for name, each in told.items()}


def _cost(ablation: Ablation, facts: Mapping[str, Any]) -> float:
    """Tokens read, or FLOPs, of all iterations."""
    if ablation.equal == "flops":
        return float(facts["iterations"] * facts["tokens per iteration"] * facts["FLOPs per token"])
    return float(facts["iterations"] * facts["tokens read per iteration"])


def _best(spent: Mapping[int, float]) -> int:
    return min(spent, key=lambda count: abs(spent[count] - 1))


def _nearer(spent: Mapping[int, float]) -> int:
    """Iterations at which more nearly all is spent, by the part that others spend; the best of these if none are."""
    best = _best(spent)
    count = max(1, round(best / spent[best]))
    low = max((n for n, part in spent.items() if part < 1), default=0)
    high = min((n for n, part in spent.items() if part > 1), default=0)
    if count == best or not low or not high:
        return count
    if high - low < 2:
        return best
    part = 0.5 if len(spent) % 2 else (1 - spent[low]) / (spent[high] - spent[low])  # a kink between would take long
    return min(max(round(low + part * (high - low)), low + 1), high - 1)


def _described(ablation: Ablation, iterations: Mapping[Arm, int]) -> dict[str, dict[str, Any]]:
    asked = {arm.name: {"processes": arm.processes, "flags": _flags(arm, arm.rates[0], ablation.seeds[0], count)}
             for arm, count in iterations.items()}  # fmt: skip
    said = subprocess.run(DESCRIBE, input=json.dumps(asked), capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"{DESCRIBE[-1]} failed:\n{said.stderr}")
    facts: dict[str, dict[str, Any]] = json.loads(said.stdout)
    for name, each in facts.items():
        if "error" in each or not each["evaluation iterations"]:
            raise UserError(f"arms.{name}: {each.get('error', 'give --eval-iters; 0 leaves no held-out loss.')}")
    return facts
