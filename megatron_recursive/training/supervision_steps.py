"""``--num-supervision-steps N``: N iterations on each global batch, or on each sample until it halts (TRM).

What a rank reads goes through :class:`HeldBatch`, which hands a step the micro-batches of the one before. An iteration
is an optimizer step: learning rates, logs and intervals count those. ``consumed_train_samples`` counts samples of the
data: a batch when its N steps are over, so that a run which is stopped within a batch starts it again; under
``--carry-halted``, where slots end at different steps, a sample when the fastest replica has read it.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.models.carried_states import CarriedStates
from megatron_recursive.plan.knobs import flag_of

Batch = dict[str, Tensor]  # [B, ...]
INTERVALS = ("save_interval", "exit_interval", "non_persistent_save_interval")


def refuse_supervision(args: argparse.Namespace) -> None:
    """What would count iterations as batches, or stop within one."""
    steps = args.num_supervision_steps
    if steps < 2:
        return
    counting = ("train_samples", "iterations_to_skip", "phase_transition_iterations", "override_ckpt_iteration")
    for name in counting:
        if getattr(args, name):
            instead = "give --train-iters" if name == "train_samples" else "leave it out"
            raise UserError(
                f"{flag_of(name)} takes an iteration for a new batch, but with --num-supervision-steps {steps} it is "
                f"an optimizer step on a carried one; {instead}."
            )
    saving = (*INTERVALS, "eval_interval") if args.keep_best else INTERVALS
    for name in saving if not args.carry_halted else ():
        every = getattr(args, name)
        if every and every % steps:
            raise UserError(
                f"{flag_of(name)} {every} would stop within a batch, which is over every --num-supervision-steps "
                f"{steps}; give {-(-every // steps) * steps}."
            )


def samples_read(args: argparse.Namespace, iterations_worth: int) -> int:
    """Of the training samples that Megatron would ask for, those that the steps will read at most."""
    steps = getattr(args, "num_supervision_steps", 1)
    if steps < 2 or args.carry_halted or args.train_iters is None:
        return iterations_worth
    return int(-(-args.train_iters // steps) * args.global_batch_size)


class HeldBatch:
    """The micro-batches of this rank, which stay until they are replaced, whole or sample by sample."""

    def __init__(self, source: Iterator[Batch], micro_batches: int) -> None:
        self.source = source
        self.batches: list[Batch | None] = [None] * micro_batches
        self.replaced: list[list[int]] = [[] for _ in self.batches]  # of each, the samples to replace
        self.reads = self._handed_out = 0
        self._spare: deque[Batch] = deque()  # samples, read and not yet used

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        number, self._handed_out = self._handed_out % len(self.batches), self._handed_out + 1
        batch = self.batches[number]
        if batch is None:
            batch = self._read()
        elif self.replaced[number]:
            batch = {name: values.clone() for name, values in batch.items()}
            for sample in self.replaced[number]:
                for name, value in self._sample().items():
                    batch[name][sample] = value
        self.batches[number], self.replaced[number] = batch, []
        return batch

    def _read(self) -> Batch:
        self.reads += 1
        return next(self.source)

    def _sample(self) -> Batch:
        if not self._spare:
            batch = self._read()
            size = len(next(iter(batch.values())))
            self._spare.extend({name: values[i] for name, values in batch.items()} for i in range(size))
        return self._spare.popleft()


class SupervisionSteps:
    """One training on one rank: which step begins on what, and who has halted."""

    def __init__(self, args: argparse.Namespace, model: Any, data_iterator: Any) -> None:
        self.args, self.model, self.steps = args, model, args.num_supervision_steps
        self.count, self.device = get_num_microbatches(), next(model.parameters()).device
        self.carried = model.carried_states = CarriedStates(self.count)
        self.held: HeldBatch | None = None
        if data_iterator is not None:  # below Megatron's own memory of a step, which may run again
            self.held = data_iterator.iterable = HeldBatch(iter(data_iterator.iterable), self.count)
        self.had = torch.zeros(self.count, args.micro_batch_size, dtype=torch.long)  # steps of each sample
        self.has_begun = False
        self.finished: Tensor | None = None  # [M, B]: the samples that the next step replaces

    def step(self, iteration: int, call: Callable[[], Any]) -> Any:
        """One iteration, numbered from 0, of Megatron's ``train_step``."""
        halts = self.args.carry_halted
        anew, self.has_begun = not self.has_begun or (not halts and iteration % self.steps == 0), True
        fresh = None if anew or self.finished is None else [*self.finished.to(torch.bool)]
        self.carried.begin(fresh, anew=anew)
        reads = 0
        if self.held is not None:
            reads = self.held.reads
            if anew:
                self.held.batches = [None] * self.count
            elif fresh is not None:
                self.held.replaced = [row.nonzero().flatten().tolist() for row in fresh]
        result = call()
        if result[3]:  # a bad result: Megatron stops, and adds nothing
            return result
        batch = self.count * self.args.micro_batch_size * self.args.data_parallel_size
        if halts:
            self.finished = self._decide(iteration)
            read = self._most(0 if self.held is None else self.held.reads - reads)
            self.args.consumed_train_samples += read * batch // self.count - batch  # Megatron is about to add a batch
        elif (iteration + 1) % self.steps:
            self.args.consumed_train_samples -= batch
        return result

    def _decide(self, iteration: int) -> Tensor:
        """[M, B], 1 where a sample is finished. The last stage decides, and tells all ranks of this replica."""
        groups = self.model.pg_collection
        finished = torch.zeros(self.count, self.args.micro_batch_size, dtype=torch.uint8, device=self.device)
        if self.model.post_process:
            self.had += 1
            halted = torch.stack(self.carried.last(self.carried.halted)).cpu()
            seed = (self.args.seed * 0x9E3779B1 ^ iteration) + parallel_state.get_data_parallel_rank() * 0x85EBCA6B
            draws = torch.Generator().manual_seed(seed & 2**63 - 1)
            explores = torch.rand(halted.shape, generator=draws) < self.args.halt_exploration
            least = explores * torch.randint(2, self.steps + 1, halted.shape, generator=draws)
            over = ((self.had >= self.steps) | halted) & (self.had >= least)
            self.had.masked_fill_(over, 0)
            finished.copy_(over)
        for group, source in ((groups.pp, groups.pp.size() - 1), (groups.tp, 0)):
            if group.size() > 1:
                torch.distributed.broadcast(finished, torch.distributed.get_global_rank(group, source), group=group)
        return finished

    def _most(self, reads: int) -> int:
        """The most micro-batches that a rank has read."""
        most = torch.tensor([reads], device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most)
