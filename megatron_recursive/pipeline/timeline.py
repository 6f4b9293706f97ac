"""When each stage of the ring computes what, simulated before a run: idle time, efficiency, live activations.

The order of operations on a rank is Megatron's: its ``get_schedule_table`` and its warm-up formula, at the group size
of ``ring_schedule``. An operation starts when its rank is free and its input is there; messages take no time. Megatron
gives every pass a backward slot. That of a grad-free pass costs nothing, but waits its turn, as its zero answer does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from torch import Tensor

from megatron_recursive.pipeline.pass_costs import PassCosts
from megatron_recursive.pipeline.windows import microbatch_group_size

FORWARD, BACKWARD = 0, 1
COLUMNS = 1000  # that a drawn rank has at most
COLUMN_SAMPLES = 17


# --- the order, from Megatron ---------------------------------------------------------------------------------------


def forward_order(stages: int, passes: int, micro_batches: int) -> list[tuple[int, int]]:
    """(micro-batch, pass) of the forwards of every rank; backwards take the passes from the last to the first."""
    # A single micro-batch at a time is what the naive ring does; Megatron itself refuses fewer than stages.
    group = microbatch_group_size(stages, micro_batches) if micro_batches >= stages else micro_batches
    return get_schedule_table(micro_batches, passes, group)


def warm_up(stages: int, rank: int, passes: int, micro_batches: int, *, interleaved: bool = True) -> int:
    """How many forwards a rank runs before its first pair of a forward and a backward."""
    group = microbatch_group_size(stages, micro_batches) if micro_batches >= stages else micro_batches
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: stages, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=passes if interleaved else None,
    )
    return get_pp_rank_microbatches(micro_batches, passes, group, p2p_communicator=communicator)[2]


# --- the simulation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A run of passes through one schedule. ``ends`` is [kind, position in the rank's order of that kind, rank]."""

    first_pass: int
    passes: int
    forward_only: bool
    order: list[tuple[int, int]]
    ends: Tensor


@dataclass(frozen=True)
class Timeline:
    """A simulated step: one phase, or for each window a forward-only one and one with backwards. Lists are by rank."""

    costs: PassCosts
    micro_batches: int
    phases: tuple[Phase, ...]
    makespan: float
    busy: list[float]
    peak_live: list[int]

    @property
    def idle(self) -> list[float]:
        return [self.makespan - work for work in self.busy]

    @property
    def efficiency(self) -> float:
        return sum(self.busy) / (len(self.busy) * self.makespan)

    def spans(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Start, end and code of what a rank works on, by start: pass + 1 forward, -(pass + 1) backward."""
        parts = []
        for phase in self.phases:
            index = torch.tensor([index for _, index in phase.order])
            for kind in (FORWARD,) if phase.forward_only else (FORWARD, BACKWARD):
                number = phase.first_pass + (index if kind == FORWARD else phase.passes - 1 - index)
                prices = torch.tensor(self.costs.backward if kind else self.costs.forward, dtype=torch.float64)
                cost, end = prices[number, rank], phase.ends[kind, :, rank]
                code = -(number + 1) if kind else number + 1
                parts.append(torch.stack([end - cost, end, code.double()])[:, cost > 0])
        start, end, code = torch.cat(parts, 1)[:, torch.cat(parts, 1)[0].argsort()]
        return start, end, code.long()

    def sample(self, ranks: Sequence[int], columns: int) -> list[list[int]]:
        """The codes of :meth:`spans` at the middle of each of ``columns`` equal times, 0 where idle; a row a rank."""
        times, rows = (torch.arange(columns, dtype=torch.float64) + 0.5) * self.makespan / columns, []
        for rank in ranks:
            start, end, code = self.spans(rank)
            at = (torch.searchsorted(start, times, right=True) - 1).clamp(min=0)
            rows.append(torch.where((start[at] <= times) & (times < end[at]), code[at], 0).tolist())
        return rows

    def boxes(self, rank: int) -> list[tuple[float, float, int]]:
        """(start, end, code) to draw a rank with: its operations, or, of too many, the busy share of each column."""
        start, end, code = self.spans(rank)
        if len(code) <= 2 * COLUMNS:
            return list(zip(start.tolist(), end.tolist(), code.tolist(), strict=True))
        (row,), width = self.sample([rank], COLUMN_SAMPLES * COLUMNS), self.makespan / COLUMNS
        found: list[tuple[float, float, int]] = []
        for column in range(COLUMNS):
            counts = Counter(filter(None, row[column * COLUMN_SAMPLES : (column + 1) * COLUMN_SAMPLES]))
            if counts:
                share, most = counts.total() / COLUMN_SAMPLES, counts.most_common(1)[0][0]
                found.append((column * width, (column + share) * width, most))
        return found


def simulate(
    costs: PassCosts, micro_batches: int, *, windows: Sequence[int] = (), interleaved: bool = True
) -> Timeline:
    """One training step of the ring. Takes about 2 M V rounds of vectors over ranks, and 16 M V P bytes.

    Args:
        windows: micro-batches of each window that runs the grad-free passes forward-only before the others; between
            the two the last stage hands the states to stage 0. None for one phase of all micro-batches.
        interleaved: False is Megatron's plain 1F1B of a single pass.
    """
    stages, passes = costs.stages, len(costs.grad)
    split = costs.grad.index(True) if windows else 0
    free, live = torch.zeros(stages, dtype=torch.float64), torch.zeros(stages, dtype=torch.long)
    phases: list[Phase] = []
    for size in windows or (micro_batches,):
        ready = torch.zeros(size, dtype=torch.float64)
        for first, last in ((0, split), (split, passes)):
            if first == last:
                continue
            engine = _Engine(costs, first, last, size, forward_only=last == split, interleaved=interleaved)
            free, peak = engine.run(free, ready)
            live = torch.maximum(live, peak)
            phases.append(engine.phase())
            ready = free[-1].expand(size)
    return Timeline(
        costs, micro_batches, tuple(phases), float(free.max()), costs.busy(micro_batches), live.tolist()
    )


class _Engine:
    """Runs one phase: in each round every rank does its next operation if the input of that is there.

    ``ends`` holds when operations end, [kind, position, column]. Rank p has column p + 1; a forward needs the end one
    column to its left, a backward the one to its right. Columns 0 and P + 1 hold what comes round the ring.
    """

    def __init__(
        self, costs: PassCosts, first: int, last: int, micro_batches: int, *, forward_only: bool, interleaved: bool
    ) -> None:
        self.first, self.passes, self.forward_only = first, last - first, forward_only
        self.stages = costs.stages
        self.order = forward_order(self.stages, self.passes, micro_batches)
        self.total = len(self.order)
        index = torch.tensor([index for _, index in self.order])
        index = torch.cat([index, torch.zeros(1, dtype=torch.long)])  # a row that nothing reaches, for finished ranks
        self.pass_of = torch.cat([first + index, len(costs.grad) + last - 1 - index])
        self.costs = torch.tensor([*costs.forward, *costs.backward], dtype=torch.float64).flatten()
        grad = torch.tensor(costs.grad, dtype=torch.long)
        self.live_change = torch.cat([grad, -grad])
        warm = self.total if forward_only else None
        self.warm = torch.tensor([
            warm or warm_up(self.stages, rank, self.passes, micro_batches, interleaved=interleaved)
            for rank in range(self.stages)
        ])  # fmt: skip
        self.ends = torch.full((2, self.total + 1, self.stages + 2), torch.nan, dtype=torch.float64)
        self.position = {entry: at for at, entry in enumerate(self.order)}

    def _hand_round(self, position: int, kind: int) -> None:
        """Pass on what the last stage (forward) or the first stage (backward) has just done."""
        batch, index = self.order[position]
        following = self.position.get((batch, index + 1))
        end = self.ends[kind, position, self.stages if kind == FORWARD else 1]
        if following is not None:
            self.ends[kind, following, 0 if kind == FORWARD else -1] = end
        elif kind == FORWARD:
            self.ends[BACKWARD, self.position[batch, 0], -1] = end

    def run(self, free: Tensor, ready: Tensor) -> tuple[Tensor, Tensor]:
        """From when ranks are free and micro-batches ready, to when ranks are done and their most live passes."""
        for batch, when in enumerate(ready):
            self.ends[FORWARD, self.position[batch, 0], 0] = when
        ends, width, rows = self.ends.view(-1), self.stages + 2, self.total + 1
        own = torch.arange(self.stages)
        forwards, backwards, live, peak = (torch.zeros(self.stages, dtype=torch.long) for _ in range(4))
        remaining = self.total * self.stages * (1 if self.forward_only else 2)
        while remaining:
            wanted = (self.warm + backwards + (not self.forward_only)).clamp_(max=self.total)
            is_backward = forwards >= wanted
            if self.forward_only:
                is_backward.fill_(False)
            row = torch.where(is_backward, backwards + rows, forwards)
            address = row * width + own + 1
            come = ends[address + 2 * is_backward - 1]
            done = ~come.isnan()
            number = self.pass_of[row]
            end = torch.maximum(free, come) + self.costs[number * self.stages + own]
            ends[address] = end  # NaN where it cannot run yet, which is what stands there already
            free = torch.where(done, end, free)
            live += self.live_change[number] * done
            peak = torch.maximum(peak, live)
            forwards += done & ~is_backward
            backwards += done & is_backward
            count, first_done, first_back, last_done, last_back, first_row, last_row = torch.stack([
                done.sum(), done[0], is_backward[0], done[-1], is_backward[-1], row[0], row[-1]
            ]).tolist()  # fmt: skip
            if not count:
                raise RuntimeError(f"the schedule stands still with {remaining} operations left")
            if last_done and not last_back:
                self._hand_round(last_row, FORWARD)
            if first_done and first_back:
                self._hand_round(first_row - rows, BACKWARD)
            remaining -= count
        return free, peak

    def phase(self) -> Phase:
        return Phase(self.first, self.passes, self.forward_only, self.order, self.ends[:, :-1, 1:-1])
