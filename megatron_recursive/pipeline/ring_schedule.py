"""The ring: the trips of a plan as virtual stages of Megatron's unmodified interleaved schedule.

A stage holds its layers once. Trip k + 1 on stage 0 needs trip k from the last stage, which is what the interleaved
schedule sends from model chunk k to chunk k + 1. So the schedule is handed V parameter-less views of the one wrapped
module, one per trip (a pass, with a prelude and coda that one stage holds alone: plan/trips.py). Only one hidden tensor
travels; stage 0 keeps the states of each micro-batch, and all sums happen there. The last stage reads the heads. A
single trip runs on Megatron's plain 1F1B.

Where the plan begins with grad-free trips, two phases may be faster: those trips forward-only over a window of
micro-batches, then the trips with gradient, and so on with the next window. Between the phases the last stage sends
the output states to stage 0, which is about to receive them: NCCL may block a message that nobody receives, and all
behind it. Each phase is one call of Megatron's schedule; what belongs to the step (its loss scale, tokens, gradient
synchronisation, finalisation) is taken out of the schedule's hands until the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model, get_model_config, make_viewless_tensor
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_recursive.errors import UserError
from megatron_recursive.models.documents import Documents
from megatron_recursive.models.layer_specs import layers_of_stages
from megatron_recursive.models.recursion_core import BlockReadout, RecursiveOutput
from megatron_recursive.models.recursion_state import RecursionState, expanded
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.pipeline.autograd import CarryGraph, JoinLeafGradient, JoinReadings
from megatron_recursive.pipeline.carrying import leave_output, leave_states, send_back
from megatron_recursive.pipeline.communication import RingCommunicator, groups_of
from megatron_recursive.pipeline.pass_costs import equal_costs
from megatron_recursive.pipeline.planner import chosen_windows
from megatron_recursive.pipeline.windows import microbatch_group_size
from megatron_recursive.plan import DecoderPass, RecursionPlan
from megatron_recursive.plan.trips import Trip, free_trips, trips_of


@dataclass
class MicroBatch:
    """What a rank remembers of one micro-batch between its trips."""

    inputs: dict[str, Any]
    loss_func: Callable[..., Any] | None = None
    state: RecursionState | None = None  # stage 0
    received: dict[str, Tensor] = field(default_factory=dict)  # stage 0: what the schedule sent, by state
    start: Tensor | None = None  # stage 0: the embedding, through a prelude, with its graph; the state reads a leaf
    graphs: dict[str, Tensor] = field(default_factory=dict)  # stage 0: what the leaves of the next trip stand for
    handed_over: tuple[Any, Tensor] | None = None  # stage 0: the output state of the first phase, and its request
    before: Tensor | None = None  # last stage: the output state before the block, detached
    output: Tensor | None = None  # last stage: the output state of the first phase
    readouts: list[BlockReadout] = field(default_factory=list)  # last stage
    metrics: dict[str, Tensor] = field(default_factory=dict)  # last stage


class PassView(torch.nn.Module):
    """One trip through the wrapped module, posing as a model chunk. It holds no parameters of its own."""

    step: RingStep
    trip: Trip
    received: Tensor | None
    micro_batch: int

    def __init__(self, step: RingStep, trip: Trip) -> None:
        super().__init__()
        # Past Module.__setattr__: a registered submodule would show its parameters V times.
        self.__dict__.update(
            step=step, trip=trip, module=step.wrapped, config=step.config, vp_stage=None,
            model_type=step.model.model_type, pg_collection=step.model.pg_collection, received=None, micro_batch=-1,
        )  # fmt: skip

    def set_input_tensor(self, tensor: Tensor | list[Tensor | None] | None) -> None:
        self.__dict__["received"] = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | RecursiveOutput:
        return self.step.run_trip(self, *args, **kwargs)


@dataclass
class StepTotals:
    """What belongs to the training step, and not to one of its windows."""

    micro_batches: int
    trips: tuple[Trip, ...]
    tokens: Tensor | int = 0  # of the windows before the last one, on the last stage


class RingStep:
    """One forward (and backward) of a window of micro-batches through a run of a plan's trips.

    ``first_phase`` is the step that ran the trips before these, if another did; ``is_last``: no window follows.
    """

    def __init__(
        self,
        wrapped: torch.nn.Module,
        plan: RecursionPlan,
        forward_step: Callable[..., Any],
        num_microbatches: int,
        trips: Sequence[Trip],
        *,
        forward_only: bool,
        totals: StepTotals,
        first_phase: RingStep | None = None,
        is_last: bool = True,
    ) -> None:
        self.wrapped, self.forward_step_func, self.trips = wrapped, forward_step, tuple(trips)
        self.model: RecursiveGPTModel = get_attr_wrapped_model(wrapped, "plan", return_model_obj=True)
        self.plan = plan
        self.train = not forward_only and torch.is_grad_enabled()
        self.hands_over = self.trips[-1] is not totals.trips[-1]  # a second phase follows
        self.forward_only = forward_only or self.hands_over
        self.num_microbatches, self.totals, self.is_last = num_microbatches, totals, is_last
        self.config = self._schedule_config(get_model_config(wrapped))
        self.micro_batches: dict[int, MicroBatch] = first_phase.micro_batches if first_phase else {}
        self.zeros: Tensor | None = None
        first = totals.trips[0]
        self.input_reader = self.plan.first_input_gradient(first.before)
        if first.before and self.input_reader is not first.around:
            self.input_reader = None  # the input's graph goes with what the first trip sends
        self.views = [PassView(self, trip) for trip in self.trips]

    def _schedule_config(self, config: Any) -> Any:
        """The model's config as the interleaved schedule must see it. A copy: the model and checkpoints stay plain."""
        ring = copy.copy(config)
        stages, interleaved = self.model.pg_collection.pp.size(), len(self.totals.trips) > 1
        if interleaved:
            ring.virtual_pipeline_model_parallel_size = len(self.trips)
            ring.microbatch_group_size_per_vp_stage = microbatch_group_size(stages, self.num_microbatches)
        # Batched point-to-point pairs activations with gradients at two stages, silently wrong.
        ring.overlap_p2p_comm, ring.batch_p2p_comm = interleaved, False
        ring.overlap_p2p_comm_warmup_flush = True  # receives are posted before what is computed meanwhile
        if self.forward_only:  # what is sent lives no longer than its message, which need not be waited for
            ring.deallocate_pipeline_outputs = False
        ring.grad_sync_func = ring.param_sync_func = None
        if not self.is_last:
            ring.finalize_model_grads_func = ring.no_sync_func = None  # the whole window stands under no_sync
        elif finalize := config.finalize_model_grads_func:

            def finalize_step(_: Any, tokens: Tensor | None, **kwargs: Any) -> None:
                finalize([self.wrapped], None if tokens is None else tokens + self.totals.tokens, **kwargs)

            ring.finalize_model_grads_func = finalize_step
        return ring

    # -- called by the schedule ----------------------------------------------------------------------------------

    def forward_step(self, data_iterator: Any, view: PassView, *_: Any) -> tuple[Any, Callable[..., Any] | None]:
        """The user's forward step runs once per micro-batch, in the first trip of this rank; later trips replay."""
        number = view.__dict__["micro_batch"] = view.micro_batch + 1
        known = self.micro_batches.get(number)
        if known is None:
            output, loss_func = self.forward_step_func(data_iterator, view)
            self.micro_batches[number].loss_func = loss_func = self._loss_of_step(loss_func)
        else:
            output, loss_func = view(**known.inputs), known.loss_func
        if view.trip is self.trips[-1]:
            if self.hands_over:
                return output, _no_loss
            del self.micro_batches[number]
        return output, loss_func

    def _loss_of_step(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        """A loss for the schedule, which divides it by the number of micro-batches of this window only."""
        if self.num_microbatches == self.totals.micro_batches:
            return loss_func

        def of_step(output: Any) -> tuple[Any, ...]:
            loss, *tokens, report = loss_func(output)
            if not self.is_last:
                self.totals.tokens = sum(tokens, self.totals.tokens)
            if not (tokens and self.config.calculate_per_token_loss):
                loss = loss * (self.num_microbatches / self.totals.micro_batches)
            return (loss, *tokens, report)

        return of_step

    def run_trip(
        self,
        view: PassView,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: Documents | None = None,
    ) -> Tensor | RecursiveOutput:
        """One trip of one micro-batch on this stage: [S, B, H] for the next stage, or the output of the model."""
        trip, model = view.trip, self.model
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask,
                  "labels": labels, "loss_mask": loss_mask, "packed_seq_params": packed_seq_params}  # fmt: skip
        batch = self.micro_batches.setdefault(view.micro_batch, MicroBatch(inputs))
        sent, received = view.received, self._answer(view.received, trip)
        view.set_input_tensor(None)
        if model.pre_process and trip is self.trips[0] and trip.index > 0:
            assert batch.handed_over is not None
            (request, received), batch.handed_over = batch.handed_over, None
            request.wait()
        with torch.set_grad_enabled(self.train and trip.around.grad):
            given = self._stage_input(batch, trip, received) if model.pre_process else received
            self._free_superseded(batch, trip, sent)
            output: Tensor | RecursiveOutput = self._decode(batch, trip.around, given)
            if model.post_process and trip is self.totals.trips[-1]:
                leave_output(model, self.plan, trip.around, output)
            for behind in trip.behind if model.post_process else ():
                output = self._decode(batch, behind, output)
        last = trip.last if model.post_process else trip.around
        if model.post_process and self.plan.is_block_end(last):
            assert isinstance(output, Tensor)
            with torch.set_grad_enabled(self.train):  # the halting head learns from grad-free blocks too
                output = self._read_block(batch, last, output)
        if isinstance(output, Tensor) and not (self.train and last.grad):
            output = output.detach()  # Megatron's blocks may mark it as requiring gradient
            if model.post_process and self.hands_over and trip is self.trips[-1]:
                batch.output = output
        if self.train and model.pre_process and trip.before and self.input_reader is None:
            assert batch.state is not None and batch.start is not None
            output = CarryGraph.apply(output, batch.start, batch.state.values["input"])
            output = make_viewless_tensor(output, True, True)  # the schedule swaps the data of what it has sent
        return output

    def _decode(self, batch: MicroBatch, decoder_pass: DecoderPass, given: Any) -> Tensor:
        """A pass through the layers of this stage. Off the first stage the decoder reads its own input tensor."""
        is_first = self.model.pre_process
        self.model.decoder.set_input_tensor(None if is_first else given)
        output = self.model.decode(
            given if is_first else None, batch.inputs["attention_mask"], stack=decoder_pass.stack,
            closes=self.plan.closes(decoder_pass), documents=batch.inputs["packed_seq_params"],
            index=decoder_pass.index,
        )  # fmt: skip
        self.model.decoder.set_input_tensor(None)
        return output

    # -- stage 0: the states -------------------------------------------------------------------------------------

    def _stage_input(self, batch: MicroBatch, trip: Trip, received: Tensor | None) -> Tensor:
        """What the first stage feeds to the decoder: the sum of states that the plan names."""
        if batch.state is None:
            batch.start = self._started(batch, trip.before)
            leaf = batch.start.detach().requires_grad_(self.train)
            told = (batch.inputs[name] for name in ("input_ids", "position_ids", "packed_seq_params"))
            batch.state = self.model.initial_state(leaf, *told)
        state, decoder_pass = batch.state, trip.around
        leaves: dict[int, tuple[Tensor, Tensor]] = {}

        def join(name: str, graph: Tensor) -> None:  # this pass alone reaches it; later ones read the leaf
            leaf = state.values[name]
            joined = JoinLeafGradient.apply(graph, leaf)
            leaves[id(joined)] = joined, leaf
            state.values.update({each: joined for each, x in state.values.items() if x is leaf})  # an output that is it

        if self.train and decoder_pass is self.input_reader:
            assert batch.start is not None
            join("input", batch.start)
        if received is not None:
            before = self.totals.trips[trip.index - 1].last
            with torch.set_grad_enabled(self.train and before.grad):
                state.update(before, received)
            if not before.replaces_state:
                self._part_of_the_way(batch, before.target)
        for name, graph in batch.graphs.items():
            join(name, graph)
        hidden = state.gather(decoder_pass)
        state.values.update({name: leaves[id(x)][1] for name, x in state.values.items() if id(x) in leaves})
        batch.graphs.clear()
        if trip is self.totals.trips[-1]:
            leave_states(self.model, self.plan, state, decoder_pass)
            if self.train:
                batch.received["input"] = state.values["input"]
            batch.state = batch.start = None
        elif trip is self.trips[-1]:  # the handover brings the next value of this state
            if trip.last.replaces_state:
                state.values.pop(trip.last.target)
            batch.received.pop(trip.last.target, None)
        return hidden

    def _started(self, batch: MicroBatch, prelude: Sequence[DecoderPass]) -> Tensor:
        """The embedding, through a prelude that this stage holds alone, in a graph of its own."""
        with torch.set_grad_enabled(self.train):
            embedding = self.model.embed(batch.inputs["input_ids"], batch.inputs["position_ids"])
        state = RecursionState(embedding, {})
        for decoder_pass in prelude:
            with torch.set_grad_enabled(self.train and decoder_pass.grad):
                state.update(decoder_pass, self._decode(batch, decoder_pass, state.gather(decoder_pass)))
        return state.values["input"]

    def _part_of_the_way(self, batch: MicroBatch, target: str) -> None:
        """A state that was moved and not replaced: its graph is short (of one sum, of a gate), and its data replaces
        the former.
        """
        assert batch.state is not None
        former, moved = batch.received.pop(target, None), batch.state.values[target]
        if self.train and moved.requires_grad:
            batch.graphs[target] = moved
            batch.state.values[target] = batch.received[target] = moved.detach().requires_grad_()
        if former is not None:
            _free(former)

    def _free_superseded(self, batch: MicroBatch, trip: Trip, sent: Tensor | None) -> None:
        """Sums keep nothing of what they add: the data of a state goes with its next value, its gradient comes later.

        The schedule holds on to what was sent until the backward of the trip.
        """
        if not self.model.pre_process or not self.train:
            return
        done: list[Tensor | None] = []
        if sent is not None:
            before = self.totals.trips[trip.index - 1].last
            done = [sent]
            if before.replaces_state:
                done = [batch.received.get(before.target)]
                batch.received[before.target] = sent
        if trip is self.totals.trips[-1]:
            done += batch.received.values()
        for tensor in done:
            if tensor is not None and tensor.grad is None:
                _free(tensor)

    def _answer(self, received: Tensor | None, trip: Trip) -> Tensor | None:
        """A received tensor that gets no gradient must still be answered on the way back, or its sender waits for ever.

        It is given a zero gradient at once; what the schedule keeps of it until then is freed.
        """
        if received is None or not self.train or self.hands_over or not received.requires_grad:
            return received
        gets_gradient = trip.around.grad
        if self.model.pre_process:
            gets_gradient = self.plan.feeds_gradient(self.totals.trips[trip.index - 1].last)
        if gets_gradient:
            return received
        if self.zeros is None:
            self.zeros = torch.zeros_like(received, requires_grad=False)
        received.grad = self.zeros
        kept = received.detach()
        received.data = received.new_empty(1)
        return kept

    # -- last stage: the heads -----------------------------------------------------------------------------------

    def _read_block(self, batch: MicroBatch, decoder_pass: DecoderPass, output: Tensor) -> Tensor | RecursiveOutput:
        """Ask the heads after a block; after the last one, put the model's output together."""
        labels, model = batch.inputs["labels"], self.model
        is_last = decoder_pass is self.plan.passes[-1]
        if labels is None:
            return model.logits_BSV(output) if is_last else output
        mask_BS = batch.inputs["loss_mask"]
        mask_BS = torch.ones_like(labels, dtype=torch.float) if mask_BS is None else mask_BS.float()
        inputs = tuple(batch.inputs[name] for name in ("input_ids", "position_ids", "packed_seq_params"))
        readout = model.read_block(self.plan, decoder_pass, output, labels, inputs)
        before = batch.before
        if before is None:
            before = expanded(getattr(model, "initial_output", None), output)
        model.observe_state(self.plan, before, output, mask_BS, decoder_pass, batch.metrics)
        batch.before = None if is_last else output.detach()
        if self.train and decoder_pass.supervised_weight > 0 and not is_last:
            said = {name: getattr(readout, name) for name in ("lm_loss_BS", "gate_logits_BS")}
            graphs = {name: tensor for name, tensor in said.items() if tensor is not None}
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in graphs.items()}
            # Viewless, since the schedule swaps the data of what it has sent.
            joined = JoinReadings.apply(output, [*leaves.values()], *graphs.values())
            output, readout = make_viewless_tensor(joined, True, True), replace(readout, **leaves)
        batch.readouts.append(readout)
        return model.objective(self.plan, batch.readouts, labels, mask_BS, batch.metrics) if is_last else output


def hand_over(step: RingStep, group: ProcessGroup) -> None:
    """Exchange the output states of a phase that has ended: the last stage sends them all, the first receives them all.

    In the pipeline-parallel group, in which no message is under way now. Each state is waited for where it is read.
    """
    first, last = (torch.distributed.get_global_rank(group, rank) for rank in (0, group.size() - 1))
    batches = step.micro_batches.values()
    sending: list[Any] = []
    for batch in batches if step.model.pre_process else ():
        assert batch.start is not None
        state = torch.empty_like(batch.start, requires_grad=False)
        batch.handed_over = torch.distributed.irecv(state, last, group=group), state
    for batch in batches if step.model.post_process else ():
        assert batch.output is not None
        sending.append(torch.distributed.isend(batch.output.contiguous(), first, group=group))
    for request in sending:
        request.wait()
    for batch in batches:
        batch.output = None


def _free(tensor: Tensor) -> None:
    """The data goes, the shape stays, which a gradient that is still to come must fit."""
    tensor.data = tensor.new_empty(1).expand_as(tensor)


def _no_loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the schedule asks of the last virtual stage, for a phase that has no loss."""
    zero = torch.zeros((), device=output.device)
    return zero, torch.zeros((), dtype=torch.int, device=output.device), {}


def ring_forward_backward(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Any,
    num_microbatches: int,
    forward_only: bool = False,
    p2p_communicator: Any = None,
    pg_collection: Any = None,
    plan: RecursionPlan | None = None,
    **kwargs: Any,
) -> list[dict[str, Tensor]]:
    """Megatron's forward-backward contract for a recursive model on several pipeline stages.

    ``plan``: of this step, another one over the model's stacks, states and heads; None is the model's own.
    """
    wrapped = model[0] if isinstance(model, list) else model
    inner = get_attr_wrapped_model(wrapped, "plan", return_model_obj=True)
    iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    groups = groups_of(p2p_communicator, pg_collection)
    group = groups.pp
    if group.size() != inner.pg_collection.pp.size():
        raise ValueError(f"the model has {inner.pg_collection.pp.size()} stages, the given group {group.size()} ranks")

    plan, stages, split = inner.plan_of_step(plan), group.size(), layers_of_stages(inner.config)
    trips = trips_of(plan, split)
    if num_microbatches < stages and len(trips) > 1:
        raise UserError(
            f"A recursion of {len(trips)} trips over --pipeline-model-parallel-size {stages} with {num_microbatches} "
            "micro-batches a step cannot be scheduled; it needs at least as many micro-batches as stages (raise "
            "--global-batch-size)."
        )
    windows: tuple[int, ...] = ()
    if not forward_only:
        config = inner.config
        price = config.pipeline_costs or partial(equal_costs, stages=stages, layers_per_stage=split)
        costs = price(plan)
        windows = chosen_windows(costs, num_microbatches, config.pipeline_phases, config.pipeline_window)
    leading = free_trips([trip.grad for trip in trips]) if windows else 0
    totals = StepTotals(num_microbatches, trips)
    # Here dispatch.py has put itself before Megatron's.
    plain = schedules.forward_backward_pipelining_without_interleaving
    schedule: Callable[..., Any] = getattr(plain, "__wrapped__", plain)
    if len(trips) > 1:
        schedule = schedules.forward_backward_pipelining_with_interleaving

    def run(step: RingStep) -> list[dict[str, Tensor]]:
        communicator = RingCommunicator(group, step.config)
        reports: list[dict[str, Tensor]] = schedule(
            forward_step_func=step.forward_step,
            data_iterator=[iterator] * len(step.views),
            model=step.views,
            num_microbatches=step.num_microbatches,
            forward_only=step.forward_only,
            pg_collection=groups,
            p2p_communicator=communicator,
            **kwargs,
        )
        step.zeros = None  # of a step that stands in cycles of references, which may not be collected for long
        if step.forward_only:
            communicator.finish()
        return reports

    def run_window(size: int, is_last: bool) -> list[dict[str, Tensor]]:
        free = None
        if leading:
            free = RingStep(wrapped, plan, forward_step_func, size, trips[:leading], forward_only=False,
                            totals=totals, is_last=is_last)  # fmt: skip
            run(free)
            hand_over(free, group)
        step = RingStep(wrapped, plan, forward_step_func, size, trips[leading:], forward_only=forward_only,
                        totals=totals, first_phase=free, is_last=is_last)  # fmt: skip
        return run(step)

    *before, last = windows or (num_microbatches,)
    with _no_sync(get_model_config(wrapped)) if before else nullcontext():
        reports = [report for size in before for report in run_window(size, is_last=False)]
    reports += run_window(last, is_last=True)
    send_back(inner, plan, group, trips[-1].around)
    return reports


def _no_sync(config: Any) -> AbstractContextManager[None]:
    """Gradients are summed in this rank's buffers alone."""
    function = config.no_sync_func
    if isinstance(function, list):  # one a model chunk, of which there is one
        (function,) = function
    return nullcontext() if function is None else function()
