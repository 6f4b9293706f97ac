"""What a run shows while it trains: its rates, compact lines and closing summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import command
from megatron_recursive.figures import blocks_of, count, duration
from megatron_recursive.training import console, progress_lines

ROWS_A_HEADER = 25


def tokens_read(run: Any) -> int:
    """Of the data so far, where the arguments of a run or of its checkpoint tell of samples of other lengths before."""
    samples, tokens = getattr(run, "samples_before", 0), getattr(run, "tokens_before", 0)
    before = min(samples, run.consumed_train_samples)  # fewer where --override-ckpt-iteration goes back
    return int(tokens * before // max(samples, 1) + (run.consumed_train_samples - before) * run.seq_length)


class Progress:
    """One run on one rank. The clock runs on every rank; the last rank, which knows the losses, shows them."""

    def __init__(self) -> None:
        self._since = self._began = time.monotonic()
        self._paused = 0.0
        self._rows = self._first = self._last = 0
        self.reached = 0  # the last iteration trained, logged or not
        self._losses: list[str] = []  # the means of the first logged interval and of the last
        self._tokens = self._read_before = self._read = 0
        self.alarms: dict[str, str] = {}  # the last of each kind
        self._held_out: tuple[int, dict[str, float]] | None = None

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Around what is no training: an evaluation, a save."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def begin(self, run: Any) -> None:
        """Training is about to start, with ``run`` as its arguments. Starts the clock."""
        self._since = self._began = time.monotonic()
        self._paused, self._first = 0.0, run.iteration + 1
        self._read = run.consumed_train_samples
        self._read_before = tokens_read(run)
        if run.rank == 0 and console.style() == "compact":
            start = f", going on from {run.load}" if run.iteration else ""
            console.say(f"training: iterations {self._first} to {run.train_iters}{start}")

    def lap(self, read: int) -> tuple[float, int]:
        """Seconds of training since the last lap, and the samples of the data since then; ``read`` are all so far."""
        now = time.monotonic()
        seconds, self._since, self._paused = now - self._since - self._paused, now, 0.0
        samples, self._read = read - self._read, read
        return seconds, samples

    def trained(self, record: dict[str, Any], means: dict[str, float], iterations: int, over: int) -> None:
        """A logged interval: ``record`` as in metrics.jsonl, ``means`` of its ``over`` iterations."""
        self._last, self._tokens = record["iteration"], record["tokens"]
        span = f"over iterations {self._last - over + 1} to {self._last}" if over > 1 else f"at iteration {self._last}"
        self._losses = [*self._losses[:1], f"{means['lm loss']:.3f} {span}"]
        if console.style() != "compact":
            return
        if self._rows % ROWS_A_HEADER == 0:
            console.say(progress_lines.header(means, iterations))
        self._rows += 1
        console.say(progress_lines.row(
            self._last, iterations, self._tokens, means, grad_norm=record.get("grad norm"),
            learning_rate=record.get("learning rate"), tokens_per_second=record["tokens per second"],
            left=(iterations - self._last) * record["seconds"],
        ))  # fmt: skip

    def evaluated(self, kind: str, iteration: int, metrics: dict[str, float], number: int | None) -> None:
        """An evaluation of a held-out (``valid``) or ``test`` set; ``number`` among several."""
        if kind == "valid" and not number:
            self._held_out = iteration, metrics
        if console.style() == "compact":
            which = {"valid": "held out", "test": "test set"}[kind] + ("" if number is None else f" {number}")
            console.say(progress_lines.evaluation(f"{which} at iteration {iteration}", metrics))

    @contextlib.contextmanager
    def saving(self, iteration: int, folder: Path, *, tell: bool) -> Iterator[None]:
        """Around the writing of a checkpoint, which is complete afterwards where ``tell`` says so."""
        start = time.monotonic()
        with self.pausing():
            yield
        if tell and console.style() == "compact":
            size, seconds = sum(f.stat().st_size for f in folder.glob("*") if f.is_file()), time.monotonic() - start
            console.say(f"checkpoint of iteration {iteration}: {folder} ({size / 1e6:,.1f} MB, {seconds:.1f} s)")

    def summary(self, args: Any) -> str:
        """What was trained, where it is, and what to type next."""
        spent = time.monotonic() - self._began
        if not self._last and self.reached:
            lines = [f"stopped: iteration {self.reached} of {args.train_iters}, before the first --log-interval "
                     f"({args.log_interval}) was over"]  # fmt: skip
        elif not self._last:
            lines = [f"nothing was trained: iteration {args.iteration} of {args.train_iters} is the last one"]
        else:
            tokens = self._tokens - self._read_before
            end = "done" if self._last >= args.train_iters else "stopped"
            lines = [f"{end}: iterations {self._first} to {self._last} of {args.train_iters}, {count(tokens)} tokens "
                     f"in {duration(spent)}, evaluations and saves included"]  # fmt: skip
        if self._losses:
            lines.append(f"  lm loss      {', '.join(self._losses)}")
        if self._held_out is not None:
            iteration, metrics = self._held_out
            blocks = ", ".join(f"{b}: {v:.3f}" for b, v in blocks_of(metrics).items())
            after = f"; after block {blocks}" if blocks else ""
            lines.append(f"  held out     {metrics['lm loss']:.3f} at iteration {iteration}{after}")
        lines += [f"  ALARM        {alarm}" for alarm in self.alarms.values()]
        lines += [f"  {name:<11}  {value}" for name, value in self._places(args)]
        if args.save is not None:
            lines.append(f"next: {command('summarize', args.save)}")
            lines.append(f"      {command('plot', args.save)}")
        return "\n".join(lines)

    def _places(self, args: Any) -> Iterator[tuple[str, Any]]:
        if args.save is not None:
            yield "checkpoints", args.save
        for name, place in (("metrics", args.metrics_file), ("events", args.tensorboard_dir)):
            if place is not None:
                yield name, place
        if console.log_path() is not None:
            yield "logs", console.log_path().parent  # type: ignore[union-attr]
