"""Megatron's GPT with its decoder applied as a plan says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_recursive.losses.exit_gate import expected_loss
from megatron_recursive.losses.halting import halting_loss, steps_until_halt, vocab_parallel_argmax
from megatron_recursive.losses.telemetry import masked, relative_change, token_cosine
from megatron_recursive.models.added_modules import MODULES, fresh_tensors
from megatron_recursive.models.checkpoint_keys import adapt_sharded_state_dict
from megatron_recursive.models.gradient_fusion import built_by_layer
from megatron_recursive.models.recursion_state import RecursionState, expanded, run_plan
from megatron_recursive.models.uses import Uses
from megatron_recursive.plan import DecoderPass, RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.added_parameters import (
    COMBINING,
    AddedParameter,
    added_parameters,
    sampled_start,
    tokens_so_far,
)


@dataclass
class RecursiveOutput:
    """What a forward pass with labels returns.

    Attributes:
        objective_BS: per-token training objective, [B, S], fp32: the supervised losses plus the weighted halting loss.
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


@dataclass
class RecursiveTransformerConfig(TransformerConfig):
    """Megatron's, and how the passes of a recursion run. The fields are named as the flags."""

    norm_weights: str = "learned"  # or ones, at which the weights of all norms stay
    pipeline_phases: str = "auto"  # one, two, or whichever is faster; read by pipeline/ring_schedule.py
    pipeline_window: int = 0  # the most micro-batches of a window of two phases; 0: a few a stage
    pipeline_costs: Any = None  # PassCosts by which the phases are chosen; None: all passes cost the same
    recompute_passes: bool = False  # keep the input of a pass only, and replay it in the backward


class RecursiveGPTModel(GPTModel):
    """A GPT whose layers are applied once per pass of a :class:`RecursionPlan`.

    With recursion disabled it *is* Megatron's GPTModel: same parameters, same forward, same checkpoint keys.

    Args:
        recursion: the resolved knobs; the plan follows from them.
        plan: another plan, for callers that build their own.
        All other arguments are GPTModel's.
    """

    config: RecursiveTransformerConfig

    def __init__(
        self, config: RecursiveTransformerConfig, *args: Any, recursion: RecursionConfig,
        plan: RecursionPlan | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        plan = plan or build_plan(recursion)
        if not plan.is_plain:
            # Transformer Engine's linears overwrite main_grad in the backward of the forward that fills this cache,
            # which is that of the first pass and comes last.
            config.disable_parameter_transpose_cache = True
        with built_by_layer(config, self):
            super().__init__(config, *args, **kwargs)
        for name, weight in self.named_parameters():
            if config.norm_weights == "ones" and "norm" in name:  # which DDP and the optimizer then leave out
                weight.requires_grad_(False)
        self.recursion, self.plan, self.uses = recursion, plan, Uses()
        self.draw = 0  # of a training step; sampled starts differ by it
        plan.layers_of(self.config.num_layers)  # refused before anything is built upon it
        self.__dict__["_blocks"] = {}  # stack -> decoder of its layers; past Module.__setattr__
        if self.plan.is_plain:
            return
        if self.plan.state_norm != "final" and self.post_process:
            # The decoder must not norm each pass; its norm moves in front of the head, under its old checkpoint key.
            self.output_norm, self.decoder.final_layernorm = self.decoder.final_layernorm, None
        self._add(added_parameters(plan))
        if plan.trains_heads_only:
            heads = {each.key for each in added_parameters(plan) if each.is_head}
            for name, weight in self.named_parameters():
                weight.requires_grad_(name in heads)

    def _add(self, declared: Sequence[AddedParameter]) -> None:
        """The modules and buffers of what the recursion adds on this stage."""
        here = {"first": self.pre_process, "last": self.post_process}
        for name in dict.fromkeys(each.module for each in declared if each.trained and here[each.stage]):
            mine = [each for each in declared if each.module == name]
            setattr(self, name, MODULES[name](self.config, mine, self.recursion, self.pg_collection.tp))
        buffers = [each for each in declared if not each.trained]
        fresh = fresh_tensors(buffers, self.config.hidden_size, self.recursion)
        for each in buffers:
            if here[each.stage] or (self.post_process and each.key == "initial_output"):  # telemetry compares with it
                vector = fresh[each.key].to(self.config.params_dtype)
                self.register_buffer(each.key, vector, persistent=here[each.stage])

    def weights_by_part(self) -> dict[str, set[torch.nn.Parameter]]:
        """The weights that each name given to :meth:`Uses.apart` stands for. A tied embedding belongs to two."""
        names = ["embedding", "output_norm", "output_layer", *MODULES]
        parts = {name.replace("_", " "): set(getattr(self, name).parameters()) for name in names if hasattr(self, name)}
        for stack, _ in self.plan.stacks:
            parts[_part_of(stack)] = set(self.block_of(stack).parameters())
        if self.post_process and self.share_embeddings_and_output_weights:
            parts["output layer"].add(self.shared_embedding_or_output_weight())
        return parts

    def plan_of_step(self, given: RecursionPlan | None) -> RecursionPlan:
        """The plan of one forward: the model's own, or another one over what the model was built with.

        Raises:
            ValueError: it asks for other parameters or states.
        """
        if given is None:
            return self.plan
        words = ("stacks", "state_init", "state_norm", "embedding_multiplier", "has_halting", "exit_gate", "maps",
                 "trains_heads_only")  # fmt: skip
        for word in words:
            if getattr(given, word) != getattr(self.plan, word):
                raise ValueError(f"the model was built with another {word} than the plan of this step has")
        return given

    # -- the three parts that passes are made of -----------------------------------------------------------------

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token ids [B, S] to the scaled embedding [S, B, H]."""

        def lookup(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            embedding: Tensor = self._preprocess(input_ids=input_ids, position_ids=position_ids)[0]
            return embedding if self.plan.embedding_multiplier == 1.0 else embedding * self.plan.embedding_multiplier

        return self.uses.apart("embedding", lookup, input_ids, position_ids)

    def initial_state(self, embedding_SBH: Tensor, input_ids: Tensor, position_ids: Tensor) -> RecursionState:
        """Where the states start. A sampled one is a function of positions alone in evaluation, and in training of
        ``draw`` (the step) and the tokens so far: whatever the layout, after a resume, and blind to what follows.
        """
        initial = {name: getattr(self, f"initial_{name}", None) for name in ("output", "latent")}
        given = {k: v for k, v in initial.items() if v is not None}
        if self.plan.state_init == "sampled" and self.pre_process:
            told = (tokens_so_far(input_ids), self.draw) if self.training else (position_ids, 0)
            known_SB = told[0].expand_as(input_ids).transpose(0, 1)
            if self.config.sequence_parallel:
                known_SB = known_SB.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
            start = sampled_start(known_SB, self.config.hidden_size, self.plan.state_std, told[1])
            given["output"] = start.to(embedding_SBH).contiguous()
        return RecursionState(
            embedding_SBH, given, starts_at_input=self.plan.starts_at_input, combine=self.combine
        )

    def combine(self, decoder_pass: DecoderPass, *values_SBH: Tensor) -> Tensor:
        """What a pass makes of what it reads, where that is no sum; the first stage has the weights."""
        name = COMBINING[decoder_pass.combine][0].module
        return self.uses.apart(name, getattr(self, name), *values_SBH)

    def block_of(self, stack: str) -> TransformerBlock:
        """The decoder, or a view of it that has a stack's layers of this pipeline stage alone; perhaps none."""
        if len(self.plan.stacks) == 1:
            return self.decoder
        if stack not in self._blocks:
            wanted = self.plan.layers_of(self.config.num_layers)[stack]
            mine = [layer for layer in self.decoder.layers if layer.layer_number - 1 in wanted]
            block = copy.copy(self.decoder)
            block._modules = {**self.decoder._modules, "layers": torch.nn.ModuleList(mine)}
            block.num_layers_per_pipeline_rank = len(mine)
            self._blocks[stack] = block
        block = self._blocks[stack]
        block.training = self.decoder.training
        return block

    def decode(
        self, hidden_SBH: Tensor | None, attention_mask: Tensor | None, inference_context: Any = None, *,
        stack: str = "core", closes: bool = False,
    ) -> Tensor:  # fmt: skip
        """One pass through a stack's layers of this stage. Off the first stage the decoder reads its own input tensor.

        ``closes``: the norm before the heads closes the pass too (``plan.closes``), on the last stage.
        ``inference_context``: keys and values of earlier tokens, of this pass alone (Megatron keys them by layer).
        """
        _, rotary, *_ = self._preprocess(
            input_ids=None, position_ids=None, decoder_input=hidden_SBH, inference_context=inference_context
        )

        block = self.block_of(stack)

        def layers(given_SBH: Tensor | None) -> Tensor:
            if not self.pre_process:
                block.set_input_tensor(given_SBH)
            result: Tensor = block(
                hidden_states=given_SBH, attention_mask=attention_mask, rotary_pos_emb=rotary,
                inference_context=inference_context,
            )  # fmt: skip
            if block is not self.decoder:  # the decoder's own is its caller's to clear
                block.set_input_tensor(None)
            return result

        # Given as an argument: what the decoder holds by the time of the replay belongs to another pass.
        given_SBH = hidden_SBH if self.pre_process else self.decoder.input_tensor
        replayed = self.config.recompute_passes and torch.is_grad_enabled()
        function = partial(tensor_parallel.checkpoint, layers, False) if replayed else layers
        result_SBH = self.uses.apart(_part_of(stack), function, given_SBH)
        if closes and hasattr(self, "output_norm"):
            result_SBH = self.uses.apart("output norm", self.output_norm, result_SBH)
        return result_SBH

    def read_block(
        self, plan: RecursionPlan, decoder_pass: DecoderPass, output_SBH: Tensor, labels_BS: Tensor
    ) -> BlockReadout:
        """Ask the heads about the output state after a block of a plan.

        The language-model head carries gradient where the plan supervises the block. The halting head learns wherever
        the plan weighs it, on all blocks but the last through their detached state. In evaluation every block is read
        in full. The last block needs no gate: what has not left leaves there.
        """
        readout, is_last = BlockReadout(decoder_pass), decoder_pass is plan.passes[-1]
        supervised = decoder_pass.supervised_weight > 0
        hidden_SBH = self._final_state(output_SBH if supervised else output_SBH.detach(), supervised)
        if plan.has_halting:
            asked_SBH = hidden_SBH if is_last else hidden_SBH.detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and decoder_pass.halt_weight > 0):
                readout.halt_logits_BS = self.uses.apart("halting head", self.halting_head, asked_SBH)
        if plan.exit_gate and not is_last:
            readout.gate_logits_BS = self.uses.apart("exit gate", self.exit_gate, hidden_SBH)
            readout.lm_loss_BS = self._replayed_loss(hidden_SBH, labels_BS)
        elif supervised or decoder_pass.halt_weight > 0 or not self.training:
            with torch.set_grad_enabled(torch.is_grad_enabled() and supervised):
                logits_SBV = self._logits(hidden_SBH)
                if plan.has_halting:
                    # Before the loss: Megatron's cross-entropy overwrites fp32 logits.
                    readout.arg_max_BS = vocab_parallel_argmax(logits_SBV.detach(), self.pg_collection.tp)
                readout.lm_loss_BS = self.compute_language_model_loss(labels_BS, logits_SBV)
        return readout

    def _final_state(self, output_SBH: Tensor, supervised: bool) -> Tensor:
        if self.plan.state_norm == "final":
            return output_SBH
        with torch.set_grad_enabled(torch.is_grad_enabled() and supervised):
            return self.uses.apart("output norm", self.output_norm, output_SBH)

    def _logits(self, hidden_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        project = partial(self._project, runtime_gather_output=runtime_gather_output)
        return self.uses.apart("output layer", project, hidden_SBH)

    def _project(self, hidden_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV: Tensor
        logits_SBV, _ = self.output_layer(hidden_SBH, weight=weight, runtime_gather_output=runtime_gather_output)
        return logits_SBV

    def _replayed_loss(self, hidden_SBH: Tensor, labels_BS: Tensor) -> Tensor:
        """The loss [B, S], its logits computed again in the backward, so that those of one block live at a time."""

        def loss_of(hidden_SBH: Tensor) -> Tensor:
            loss_BS: Tensor = self.compute_language_model_loss(labels_BS, self._project(hidden_SBH))
            return loss_BS

        return self.uses.apart("output layer", partial(tensor_parallel.checkpoint, loss_of, False), hidden_SBH)

    def logits_BSV(self, output_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        """Logits [B, S, V] of an output state (this rank's shard of V unless gathered)."""
        hidden_SBH = self._final_state(output_SBH, supervised=True)
        return self._logits(hidden_SBH, runtime_gather_output).transpose(0, 1).contiguous()

    # -- the whole model in one graph ----------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        plan: RecursionPlan | None = None,
        **kwargs: Any,
    ) -> Tensor | RecursiveOutput:
        """Run a plan.

        Args:
            input_ids, position_ids, labels: [B, S]. loss_mask: [B, S], 1 where a token counts; None counts all.
            attention_mask: boolean, True hides; None is causal.
            plan: of this forward, another one over the same stacks, states and heads; None is the model's own.

        Returns:
            Without labels, the logits after the last block, [B, S, V] (this rank's shard of V unless gathered).
            With labels, a :class:`RecursiveOutput`; a disabled recursion returns what GPTModel does.
        """
        if self.plan.is_plain:
            return super().forward(
                input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask,
                runtime_gather_output=runtime_gather_output, **kwargs,
            )
        unsupported = [name for name, value in kwargs.items() if value is not None]
        assert not unsupported, f"RecursiveGPTModel does not take {', '.join(unsupported)}"
        assert self.pre_process and self.post_process, "a recursive model on one pipeline stage only"
        plan = self.plan_of_step(plan)
        state = self.initial_state(self.embed(input_ids, position_ids), input_ids, position_ids)

        def decode(decoder_pass: DecoderPass, hidden_SBH: Tensor) -> Tensor:
            closes = plan.closes(decoder_pass)
            return self.decode(hidden_SBH, attention_mask, stack=decoder_pass.stack, closes=closes)

        if labels is None:
            for _ in run_plan(plan, state, decode):
                pass
            return self.logits_BSV(state.output, runtime_gather_output)

        mask_BS = torch.ones_like(labels, dtype=torch.float) if loss_mask is None else loss_mask.float()
        readouts: list[BlockReadout] = []
        metrics: dict[str, Tensor] = {}
        before = expanded(getattr(self, "initial_output", None), state.values["input"])
        for decoder_pass in run_plan(plan, state, decode):
            readouts.append(self.read_block(plan, decoder_pass, state.output, labels))
            self.observe_state(plan, before, state.output, mask_BS, decoder_pass, metrics)
            before = state.output.detach()
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
            losses = [r.decoder_pass.supervised_weight * r.lm_loss_BS for r in readouts if r.lm_loss_BS is not None]
            gates = [r.gate_logits_BS for r in readouts if r.gate_logits_BS is not None]
            objective_BS, gated = expected_loss(losses, gates, self.recursion.exit_entropy_weight)
        for readout in readouts if not plan.exit_gate else ():
            if readout.lm_loss_BS is not None and readout.decoder_pass.supervised_weight > 0:
                objective_BS = objective_BS + readout.decoder_pass.supervised_weight * readout.lm_loss_BS.float()
            if readout.decoder_pass.halt_weight > 0:
                goal_BS = labels_BS if self.recursion.halt_target == "correct" else last.arg_max_BS
                assert readout.halt_logits_BS is not None and readout.arg_max_BS is not None and goal_BS is not None
                loss_BS = halting_loss(readout.halt_logits_BS, torch.eq(readout.arg_max_BS, goal_BS))
                halt_loss_BS = halt_loss_BS + readout.decoder_pass.halt_weight * loss_BS
        if plan.has_halting:
            objective_BS = objective_BS + self.recursion.halt_loss_weight * halt_loss_BS
        reported = {"lm loss": masked(last.lm_loss_BS.detach(), mask_BS)}
        if plan.has_halting:
            reported["halt loss"] = masked(halt_loss_BS.detach(), mask_BS)
            logits_TBS = torch.stack([r.halt_logits_BS.detach() for r in readouts if r.halt_logits_BS is not None])
            reported["mean halting probability"] = masked(torch.sigmoid(logits_TBS).mean(0), mask_BS)
            steps_BS = steps_until_halt(logits_TBS, self.recursion.halt_threshold)
            reported["expected refinement steps"] = masked(steps_BS, mask_BS)
        reported |= {name: masked(value_BS, mask_BS) for name, value_BS in gated.items()}
        reported["total loss"] = masked(objective_BS.detach(), mask_BS)
        for readout in readouts:
            if readout.lm_loss_BS is not None and len(readouts) > 1:
                name = f"lm loss block {readout.decoder_pass.block + 1}"
                reported[name] = masked(readout.lm_loss_BS.detach(), mask_BS)
        return RecursiveOutput(objective_BS, {**reported, **metrics})

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return adapt_sharded_state_dict(sharded, prefix)


def _part_of(stack: str) -> str:
    """The name of a stack's weights as a part of the model."""
    return "layers" if stack == "core" else f"{stack} layers"
