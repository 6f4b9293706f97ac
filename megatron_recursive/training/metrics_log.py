"""Every logged and evaluated metric also goes to metrics.jsonl, and health alarms speak."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.errors import DISK_FULL, UserError
from megatron_recursive.figures import NOTHING, blocks_of
from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans
from megatron_recursive.training import console
from megatron_recursive.training.progress import Progress, tokens_read

WINDOW = 50  # iterations that an alarm averages over
COLLAPSE_COSINE = 0.95  # mean token-to-token cosine of the last output state
FALLING = 0.05  # a cosine that fell by this much within the window is on its way down
SUPERVISED = "supervised tokens"  # of conversations; in a record, those of the interval
LATEST = 500  # iterations after which the alarms speak at the latest


class MetricsLog:
    """One run's metrics, already averaged over micro-batches and ranks: to the file, the alarms and the progress.

    ``description`` is what the file says of the run before its metrics. Every rank has a log; the last, which knows the
    losses, writes. ``plans``: of its steps, whose depth a record says where it changes.
    """

    def __init__(
        self, recursion: RecursionConfig, plans: StepPlans, description: dict[str, Any], progress: Progress
    ) -> None:
        self.progress, self.plans = progress, plans
        # Elsewhere readers multiply tokens, which carried steps read several times.
        self._counts_flops = plans.changes or recursion.num_supervision_steps > 1
        self._description: dict[str, Any] | None = description
        self._alarms = HealthAlarms(recursion, plans.plan)
        self._pending: list[tuple[int, dict[str, Any]]] = []  # on the device until an interval's end

    def start(self, run: argparse.Namespace) -> None:
        """Checkpoint and data are there: a start that was refused leaves no record."""
        description, self._description = self._description, None
        if run.train_only is not None:  # the weights that the alarms speak of are frozen
            self._alarms.after = 0
        if description and run.rank == run.world_size - 1:
            start = {"kind": "run", "iteration": run.iteration, "time": time.time(), "tokens": tokens_read(run)}
            append_metrics(run.metrics_file, {**start, **description})

    def trained(self, run: argparse.Namespace, given: Mapping[str, Any]) -> None:
        """An iteration is over; ``given`` are the arguments of Megatron's ``training_log``."""
        if not given["loss_dict"] or run.rank != run.world_size - 1:
            return
        iteration = self.progress.reached = given["iteration"]
        self._pending.append((iteration, given["loss_dict"]))
        if iteration % run.log_interval and iteration != run.train_iters:  # a run's end is an interval's
            return
        known = [(step, {name: float(value) for name, value in values.items()}) for step, values in self._pending]
        self._pending.clear()
        for step, metrics in known:
            for alarm in self._alarms.observe(step, metrics, run.train_iters):
                console.say(f"ALARM at iteration {step}: {alarm}")
                self.progress.alarms[alarm.split(":")[0]] = f"{alarm} (iteration {step})"
                append_metrics(run.metrics_file, {"kind": "alarm", "iteration": step, "alarm": alarm})
        seconds, read = self.progress.lap(run.consumed_train_samples)
        record = {
            "kind": "train", "iteration": iteration, "consumed samples": run.consumed_train_samples,
            "tokens": tokens_read(run), **metrics, "time": time.time(), "seconds": seconds / len(known),
            "tokens per second": read * run.seq_length / seconds,
        }  # fmt: skip
        if self.plans.changes:
            record["recurrence"] = self.plans.plan_at(iteration - 1).depth
        if self._counts_flops:
            record["FLOPs"] = run.flops_spent
        if SUPERVISED in metrics:
            record[SUPERVISED] = sum(round(each[SUPERVISED]) for _, each in known)
        for name in ("learning_rate", "grad_norm"):
            if given.get(name) is not None:
                record[name.replace("_", " ")] = float(given[name])
        append_metrics(run.metrics_file, record)
        shown = [name for name in metrics if not (self.plans.changes and " block " in name)]  # a column has one meaning
        means = {name: _mean([each[name] for _, each in known if name in each]) for name in shown}
        self.progress.trained(record, means, run.train_iters, len(known))

    def evaluated(
        self, run: argparse.Namespace, kind: str, iteration: int, sets: Sequence[Mapping[str, Any]]
    ) -> None:
        """The metrics of each set of an evaluation."""
        for number, values in enumerate(sets):
            metrics = {name: float(value) for name, value in values.items()}
            if "token accuracy" in metrics:  # of conversations: on what the assistant says
                metrics["perplexity"] = math.exp(min(metrics["lm loss"], 700.0))
            if metrics and run.rank == run.world_size - 1:
                record = {"kind": kind, "iteration": iteration, "time": time.time(),
                          "tokens": tokens_read(run), **metrics}  # fmt: skip
                if (served := self.plans.served_plan(iteration)) is not self.plans.plan:
                    record["recurrence"] = served.depth
                if self._counts_flops and hasattr(run, "flops_spent"):
                    record["FLOPs"] = run.flops_spent
                if len(sets) > 1:
                    record["set"] = number
                append_metrics(run.metrics_file, record)
                self.progress.evaluated(kind, iteration, metrics, number if len(sets) > 1 else None)


def append_metrics(file: str | None, record: dict[str, Any]) -> None:
    """Append one JSON object to the metrics file (None: nowhere). What a killed run left of a line is cut off."""
    if file is None:
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b") as stream:
            stream.seek(0)
            text = stream.read() if record["kind"] == "run" else b""
            if text and not text.endswith(b"\n"):
                stream.truncate(text.rfind(b"\n") + 1)
            stream.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(
            f"The metrics file {file} cannot be written ({error.strerror}); "
            f"{'make room' if error.errno in DISK_FULL else 'mend that'} and start the same command again, which goes "
            "on from its last checkpoint, or name another file with --metrics-file."
        ) from error


class HealthAlarms:
    """Says when a recursion does not use its depth. Means over ``WINDOW`` iterations, said at most once a window.

    * state ignored: the last block's loss is within ``NOTHING`` nats of the first block's.
    * harm: in the second half of the run the last block's loss is above the first's by more. Earlier it may be: a
      healthy recursion passes through that while its tokens separate.
    * collapse: the token-to-token cosine of the last output state is above ``COLLAPSE_COSINE`` and is not falling. Runs
      that learn pass through 0.8 to 0.99 before they know more than each token's frequency; answers of few kinds stay
      near 0.9.

    Each must hold over the window and over the last fifth of it.
    """

    def __init__(self, recursion: RecursionConfig, plan: RecursionPlan) -> None:
        self.after = recursion.recursion_alarm_after if recursion.enable_recursive_refinement else 0
        self.blocks = plan.num_blocks
        self.carries = recursion.num_supervision_steps > 1  # the first block goes on where the last one ended
        self.detached = any(p.cuts_states for p in plan.passes)
        self.gains: deque[float] = deque(maxlen=WINDOW)
        self.cosines: deque[float] = deque(maxlen=WINDOW)
        self.quiet_until = 0

    def observe(self, iteration: int, metrics: dict[str, float], iterations: int) -> list[str]:
        """Take in the metrics of an iteration of so many; returns what must be said."""
        losses = blocks_of(metrics)  # of as many blocks as the step had
        if len(losses) > 1 and not self.carries:
            self.blocks = max(losses)
            self.gains.append(losses[min(losses)] - losses[self.blocks])
        if "token cosine" in metrics:
            self.cosines.append(metrics["token cosine"])
        after = min(LATEST, max(iterations // 10, 1)) if self.after is None else self.after
        if after == 0 or iteration < after or iteration < self.quiet_until:
            return []
        alarms = []
        if len(self.gains) == WINDOW:
            alarms += self._of_gain(_mean(self.gains), _latest(self.gains), late=2 * iteration >= iterations)
        if len(self.cosines) == WINDOW:
            cosine = _mean(self.cosines)
            earliest, latest = _mean(list(self.cosines)[: WINDOW // 5]), _latest(self.cosines)
            if min(cosine, latest) > COLLAPSE_COSINE and latest > earliest - FALLING:
                alarms.append(
                    f"tokens have collapsed: their output states' mean cosine is {cosine:.3f}, where {COLLAPSE_COSINE} "
                    "is the most; try another --init-method-std, --embedding-multiplier or a lower --lr."
                )
        if alarms:
            self.quiet_until = iteration + WINDOW
        return alarms

    def _of_gain(self, gain: float, latest: float, *, late: bool) -> list[str]:
        """``gain`` is the mean of the window, ``latest`` that of its end."""
        if max(gain, latest) > NOTHING or (min(gain, latest) < -NOTHING and not late):
            return []
        what = "the state is ignored" if gain > -NOTHING else "the last block does harm"
        mend = ", or --no-detach-between-refinements" if self.detached else ""
        return [
            f"{what}: over the last {WINDOW} iterations the loss after block {self.blocks} is {abs(gain):.4f} "
            f"{'below' if gain > 0 else 'above'} the loss after block 1, where {NOTHING} below is the "
            f"least; try another --init-method-std, --embedding-multiplier or --lr{mend}."
        ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _latest(values: Iterable[float]) -> float:
    """The mean of the last fifth of a window: what has left a bad state by then is on its way out."""
    known = list(values)
    return _mean(known[-(len(known) // 5) :])
