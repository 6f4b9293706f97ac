"""What a recursion adds to a base model: states, passes, heads and the objective. It knows no base.

A base answers four questions: its embedding (``embed``), a pass through some of its layers (``decode``), the norm
before its heads (``final_norm``) and its logits (``project``). ``RecursiveGPTModel`` answers with Megatron's GPT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_recursive.losses.distillation import Distillation
from megatron_recursive.losses.exit_gate import expected_loss, improvement_loss
from megatron_recursive.losses.halting import halting_loss, steps_until_halt, vocab_parallel_argmax
from megatron_recursive.losses.telemetry import masked, relative_change, token_cosine
from megatron_recursive.models.added_modules import MODULES, AddedModule, fresh_tensors
from megatron_recursive.models.carried_states import CarriedStates
from megatron_recursive.models.documents import Documents
from megatron_recursive.models.recursion_state import RecursionState, expanded, run_plan
from megatron_recursive.models.uses import Uses
from megatron_recursive.plan import DecoderPass, RecursionConfig, RecursionPlan
from megatron_recursive.plan.added_parameters import (
    COMBINING,
    MOVING,
    AddedParameter,
    sampled_start,
    tokens_so_far,
)
from megatron_recursive.plan.recursion_plan import STATES
from megatron_recursive.plan.supervision_steps import in_a_row


@dataclass
class RecursiveOutput:
    """What a forward pass with labels returns.

    Attributes:
        objective_BS: per-token training objective, [B, S], fp32: the losses as the plan weighs them, and the heads'.
        metrics: name to a tensor (sum, count) over the loss mask, detached.
    """

    objective_BS: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class BlockReadout:
    """What the heads say after one block: all [B, S], None where not asked."""

    decoder_pass: DecoderPass
    lm_loss_BS: Tensor | None = None
    arg_max_BS: Tensor | None = None
    halt_logits_BS: Tensor | None = None
    gate_logits_BS: Tensor | None = None
    distillation_BS: Tensor | None = None


def part_of(stack: str) -> str:
    """The name of a stack's weights as a part of the model."""
    return "layers" if stack == "core" else f"{stack} layers"


class RecursionCore:
    """Runs a plan over the base model that it is mixed into."""

    config: Any
    pg_collection: Any
    training: bool
    register_buffer: Callable[..., None]
    pre_process: bool
    post_process: bool
    halting_head: AddedModule
    exit_gate: AddedModule
    recursion: RecursionConfig
    plan: RecursionPlan
    uses: Uses
    distillation: Distillation | None = None  # of the last block, in training
    draw: int  # of a training step; sampled starts differ by it
    reports_accuracy: bool  # in evaluation, of the last block's choice
    carried_states: CarriedStates | None
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor]  # labels [B, S] and logits [S, B, V] to [B, S]

    # -- what a base answers -------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token ids [B, S] to the scaled embedding [S, B, H]; on the first stage."""
        raise NotImplementedError

    def decode(
        self, hidden_SBH: Tensor | None, attention_mask: Tensor | None, inference_context: Any = None, *,
        stack: str = "core", closes: bool = False, documents: Documents | None = None, index: int = 0,
    ) -> Tensor:  # fmt: skip
        """Pass ``index`` through a stack's layers of this stage; ``closes``: and the final norm, where it is."""
        raise NotImplementedError

    def final_norm(self, hidden_SBH: Tensor) -> Tensor:
        """The norm before the heads, on the last stage, where it does not close every pass."""
        raise NotImplementedError

    def project(self, hidden_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        """Logits [S, B, V] of a normed state, on the last stage."""
        raise NotImplementedError

    # -- what it adds --------------------------------------------------------------------------------------------

    def add_parameters(self, declared: Sequence[AddedParameter]) -> None:
        """The modules and buffers of what the recursion adds on this stage."""
        here = {"first": self.pre_process, "last": self.post_process}
        names = [each.module for each in declared if each.trained and here[each.stage]]
        names += [MOVING[word].module for word in self.plan.moves if here["first"]]  # which may have no parameter
        for name in dict.fromkeys(names):
            mine = [each for each in declared if each.module == name]
            setattr(self, name, MODULES[name](self.config, mine, self.recursion, self.pg_collection.tp))
        buffers = [each for each in declared if not each.trained]
        fresh = fresh_tensors(buffers, self.config.hidden_size, self.recursion)
        for each in buffers:
            if here[each.stage] or (self.post_process and each.key == "initial_output"):  # telemetry compares with it
                vector = fresh[each.key].to(self.config.params_dtype)
                self.register_buffer(each.key, vector, persistent=here[each.stage])

    def plan_of_step(self, given: RecursionPlan | None) -> RecursionPlan:
        """The plan of one forward: the model's own, or another one over what the model was built with.

        Raises:
            ValueError: it asks for other parameters or states.
        """
        if given is None:
            return self.plan if self.training else in_a_row(self.plan, self.recursion.num_supervision_steps)
        words = ("stacks", "state_init", "state_std", "state_norm", "embedding_multiplier", "has_halting", "exit_gate",
                 "maps", "moves", "trains_heads_only")  # fmt: skip
        for word in words:
            if getattr(given, word) != getattr(self.plan, word):
                raise ValueError(f"the model was built with another {word} than the plan of this step has")
        return given

    def initial_state(
        self, embedding_SBH: Tensor, input_ids: Tensor, position_ids: Tensor, documents: Documents | None = None
    ) -> RecursionState:
        """Where the states start. A sampled one is a function of positions alone in evaluation, and in training of
        ``draw`` (the step) and the document's tokens so far: whatever the layout, after a resume, and blind to what
        follows and to other documents.
        """
        initial = {name: getattr(self, f"initial_{name}", None) for name in STATES}
        given = {k: v for k, v in initial.items() if v is not None}
        if self.plan.samples_start and self.pre_process:
            places_BS = None if documents is None else documents.places(len(input_ids))
            told = (tokens_so_far(input_ids, places_BS), self.draw) if self.training else (position_ids, 0)
            known_SB = told[0].expand_as(input_ids).transpose(0, 1)
            if self.config.sequence_parallel:
                known_SB = known_SB.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
            start = sampled_start(known_SB, self.config.hidden_size, self.plan.state_std, told[1])
            given["output"] = start.to(embedding_SBH).contiguous()  # it may be sent
        if self.carried is not None:
            names = self.plan.carried
            given |= self.carried.start({name: expanded(given.get(name), embedding_SBH) for name in names})
        return RecursionState(
            embedding_SBH, given, starts_at_input=self.plan.starts_at_input, combine=self.combine, move=self.move
        )

    @property
    def carried(self) -> CarriedStates | None:
        """What a training step takes from the one before and leaves to the next; None where it does not."""
        return self.carried_states if self.training else None

    def combine(self, decoder_pass: DecoderPass, *values_SBH: Tensor) -> Tensor:
        """What a pass makes of what it reads, where that is no sum; the first stage has the weights."""
        name = COMBINING[decoder_pass.combine][0].module
        return self.uses.apart(name, getattr(self, name), *values_SBH)

    def move(self, decoder_pass: DecoderPass, *values_SBH: Tensor) -> Tensor:
        """What a state becomes by a pass's result, where that is no step. A ring frees what it was given."""
        name = MOVING[decoder_pass.move].module
        return self.uses.apart(name.replace("_", " "), getattr(self, name), *values_SBH)

    def read_block(
        self, plan: RecursionPlan, decoder_pass: DecoderPass, output_SBH: Tensor, labels_BS: Tensor,
        inputs: tuple[Any, ...] = (),
    ) -> BlockReadout:  # fmt: skip
        """Ask the heads about the output state after a block of a plan.

        The language-model head carries gradient where the plan supervises the block. The halting head learns wherever
        the plan weighs it, on all blocks but the last through their detached state. In evaluation every block is read
        in full. The last block needs no gate: what has not left leaves there; a
        gate that is trained alone learns there too. ``inputs`` are a teacher's: token ids, positions, documents.
        """
        readout, is_last = BlockReadout(decoder_pass), decoder_pass is plan.passes[-1]
        supervised = decoder_pass.supervised_weight > 0
        hidden_SBH = self._final_state(output_SBH if supervised else output_SBH.detach(), supervised)
        if plan.has_halting:
            asked_SBH = hidden_SBH if is_last else hidden_SBH.detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and decoder_pass.halt_weight > 0):
                readout.halt_logits_BS = self.uses.apart("halting head", self.halting_head, asked_SBH)
        if plan.exit_gate and (not is_last or plan.trains_heads_only):
            readout.gate_logits_BS = self.uses.apart("exit gate", self.exit_gate, hidden_SBH)
        if plan.is_projected(decoder_pass) or not self.training:
            with torch.set_grad_enabled(torch.is_grad_enabled() and supervised):
                replays = torch.is_grad_enabled() and plan.is_replayed(decoder_pass)
                teacher = self.distillation if is_last and self.training else None
                pull = None if teacher is None else partial(teacher.loss, self.pg_collection.tp, inputs)
                chooses = plan.has_halting or (self.reports_accuracy and is_last and not self.training)
                found = self._loss(hidden_SBH, labels_BS, chooses, replays, pull)
                readout.lm_loss_BS, readout.arg_max_BS, readout.distillation_BS = found
        return readout

    def _loss(
        self, hidden_SBH: Tensor, labels_BS: Tensor, chooses: bool, replays: bool,
        pull: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss [B, S], the arg-max [B, S] where it ``chooses``, and what ``pull`` makes of the logits.

        See ``RecursionPlan.is_replayed``.
        """
        chosen: list[Tensor] = []

        def loss_of(hidden_SBH: Tensor) -> Tensor:
            logits_SBV = self.project(hidden_SBH)
            if chooses and not chosen:  # a replay need not ask again
                # Before the loss: Megatron's cross-entropy overwrites fp32 logits.
                chosen.append(vocab_parallel_argmax(logits_SBV.detach(), self.pg_collection.tp))
            pulled = [] if pull is None else [pull(logits_SBV)]
            return torch.stack([self.compute_language_model_loss(labels_BS, logits_SBV), *pulled])

        function = partial(tensor_parallel.checkpoint, loss_of, False) if replays else loss_of
        loss_BS, *pulled = self.uses.apart("output layer", function, hidden_SBH)
        return loss_BS, chosen[0] if chosen else None, pulled[0] if pulled else None

    def _final_state(self, output_SBH: Tensor, supervised: bool) -> Tensor:
        if not self.plan.norms_before_heads:
            return output_SBH
        with torch.set_grad_enabled(torch.is_grad_enabled() and supervised):
            return self.final_norm(output_SBH)

    def _logits(self, hidden_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        project = partial(self.project, runtime_gather_output=runtime_gather_output)
        return self.uses.apart("output layer", project, hidden_SBH)

    def logits_BSV(self, output_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        """Logits [B, S, V] of an output state (this rank's shard of V unless gathered)."""
        hidden_SBH = self._final_state(output_SBH, supervised=True)
        return self._logits(hidden_SBH, runtime_gather_output).transpose(0, 1).contiguous()

    # -- the whole model in one graph ----------------------------------------------------------------------------

    def run(
        self, plan: RecursionPlan | None, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None,
        labels: Tensor | None, loss_mask: Tensor | None, runtime_gather_output: bool | None,
        documents: Documents | None = None,
    ) -> Tensor | RecursiveOutput:  # fmt: skip
        """All passes on one stage; see ``RecursiveGPTModel.forward``."""
        plan = self.plan_of_step(plan)
        state = self.initial_state(self.embed(input_ids, position_ids), input_ids, position_ids, documents)

        ends: dict[str, Tensor] = {}  # where carried states end, other than the plan does

        def decode(decoder_pass: DecoderPass, hidden_SBH: Tensor) -> Tensor:
            closes = plan.closes(decoder_pass)
            if decoder_pass.index == plan.carried_behind + 1:
                ends["output"] = state.output
            return self.decode(
                hidden_SBH, attention_mask, stack=decoder_pass.stack, closes=closes, documents=documents,
                index=decoder_pass.index,
            )

        if labels is None:
            for _ in run_plan(plan, state, decode):
                pass
            return self.logits_BSV(state.output, runtime_gather_output)

        mask_BS = torch.ones_like(labels, dtype=torch.float) if loss_mask is None else loss_mask.float()
        readouts: list[BlockReadout] = []
        metrics: dict[str, Tensor] = {}
        before = expanded(getattr(self, "initial_output", None), state.values["input"])
        for decoder_pass in run_plan(plan, state, decode):
            inputs = (input_ids, position_ids, documents)
            readouts.append(self.read_block(plan, decoder_pass, state.output, labels, inputs))
            self.observe_state(plan, before, state.output, mask_BS, decoder_pass, metrics)
            before = state.output.detach()
        if self.carried is not None:
            for name in plan.carried:
                self.carried.leave(name, ends.get(name, state.values[name]))
        return self.objective(plan, readouts, labels, mask_BS, metrics)

    def observe_state(
        self, plan: RecursionPlan, before: Tensor, after: Tensor, mask_BS: Tensor, decoder_pass: DecoderPass,
        metrics: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Telemetry of the state after a block. Under sequence parallelism a rank holds a part of the tokens."""
        mask_SB, group = mask_BS.transpose(0, 1), None
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            mask_SB = mask_SB.chunk(group.size(), dim=0)[group.rank()]
        with torch.no_grad():
            # Where a state starts at the input, is sampled or carried, the last stage does not see it.
            if decoder_pass.block > 0 or not (plan.starts_at_input or plan.samples_start or self.carried is not None):
                name = f"output change block {decoder_pass.block + 1}"
                metrics[name] = relative_change(before.detach(), after.detach(), mask_SB, group)
            if decoder_pass is plan.passes[-1]:
                metrics["token cosine"] = token_cosine(after.detach(), mask_SB, group)

    def objective(
        self, plan: RecursionPlan, readouts: list[BlockReadout], labels_BS: Tensor, mask_BS: Tensor,
        metrics: dict[str, Tensor],
    ) -> RecursiveOutput:  # fmt: skip
        """Sum the losses as the plan weighs them, and report each on its own."""
        last = readouts[-1]
        assert last.lm_loss_BS is not None
        objective_BS = torch.zeros_like(last.lm_loss_BS, dtype=torch.float)
        halt_loss_BS = torch.zeros_like(objective_BS)
        gated: dict[str, Tensor] = {}
        if plan.exit_gate:
            weighed = ((r.decoder_pass.supervised_weight or 1.0, r.lm_loss_BS) for r in readouts)
            losses = [weight * loss_BS for weight, loss_BS in weighed if loss_BS is not None]
            gates = [r.gate_logits_BS for r in readouts if r.gate_logits_BS is not None]
            objective_BS, gated = expected_loss(losses, gates[: len(losses) - 1], self.recursion.exit_entropy_weight)
            if plan.trains_heads_only:
                objective_BS = improvement_loss(losses, gates)
                gated["gate loss"] = objective_BS.detach()
        for readout in readouts if not plan.exit_gate else ():
            if readout.lm_loss_BS is not None and readout.decoder_pass.supervised_weight > 0:
                objective_BS = objective_BS + readout.decoder_pass.supervised_weight * readout.lm_loss_BS.float()
            if readout.decoder_pass.halt_weight > 0:
                goal_BS = labels_BS if self.recursion.halt_target == "correct" else last.arg_max_BS
                assert readout.halt_logits_BS is not None and readout.arg_max_BS is not None and goal_BS is not None
                loss_BS = halting_loss(readout.halt_logits_BS, torch.eq(readout.arg_max_BS, goal_BS))
                halt_loss_BS = halt_loss_BS + readout.decoder_pass.halt_weight * loss_BS
        distilled: dict[str, Tensor] = {}
        if last.distillation_BS is not None and self.distillation is not None:
            weight, distilled = self.distillation.weight, {"distillation loss": last.distillation_BS.detach()}
            objective_BS = (1 - weight) * objective_BS + weight * last.distillation_BS
        if plan.has_halting and self.carried is not None:
            assert last.halt_logits_BS is not None
            probability_BS = torch.sigmoid(last.halt_logits_BS.detach().float())
            self.carried.halted.append(((probability_BS >= self.recursion.halt_threshold) | (mask_BS == 0)).all(1))
        if plan.has_halting:
            objective_BS = objective_BS + self.recursion.halt_loss_weight * halt_loss_BS
        reported = {"lm loss": masked(last.lm_loss_BS.detach(), mask_BS)}
        if plan.has_halting:
            reported["halt loss"] = masked(halt_loss_BS.detach(), mask_BS)
            logits_TBS = torch.stack([r.halt_logits_BS.detach() for r in readouts if r.halt_logits_BS is not None])
            reported["mean halting probability"] = masked(torch.sigmoid(logits_TBS).mean(0), mask_BS)
            steps_BS = steps_until_halt(logits_TBS, self.recursion.halt_threshold)
            reported["expected refinement steps"] = masked(steps_BS, mask_BS)
        if self.reports_accuracy and not self.training and last.arg_max_BS is not None:
            reported["token accuracy"] = masked(torch.eq(last.arg_max_BS, labels_BS), mask_BS)
        reported |= {name: masked(value_BS, mask_BS) for name, value_BS in (gated | distilled).items()}
        reported["total loss"] = masked(objective_BS.detach(), mask_BS)
        for readout in readouts:
            if readout.lm_loss_BS is not None and len(readouts) > 1:
                name = f"lm loss block {readout.decoder_pass.block + 1}"
                reported[name] = masked(readout.lm_loss_BS.detach(), mask_BS)
        return RecursiveOutput(objective_BS, {**reported, **metrics})
