"""Megatron's GPT with its decoder applied as a plan says."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_recursive.losses.halting import vocab_parallel_argmax
from megatron_recursive.losses.telemetry import masked
from megatron_recursive.models.added_modules import MODULES
from megatron_recursive.models.checkpoint_keys import adapt_sharded_state_dict
from megatron_recursive.models.documents import Documents
from megatron_recursive.models.gradient_fusion import built_by_layer
from megatron_recursive.models.low_rank import adapters_by_pass, add_adapters, of_pass
from megatron_recursive.models.recursion_core import RecursionCore, RecursiveOutput, part_of
from megatron_recursive.models.uses import Uses
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.added_parameters import added_parameters
from megatron_recursive.plan.lora import LoRA


@dataclass
class RecursiveTransformerConfig(TransformerConfig):
    """Megatron's, and how the passes of a recursion run. The fields are named as the flags."""

    norm_weights: str = "learned"  # or ones, at which the weights of all norms stay
    pipeline_phases: str = "auto"  # one, two, or whichever is faster; read by pipeline/ring_schedule.py
    pipeline_window: int = 0  # the most micro-batches of a window of two phases; 0: a few a stage
    pipeline_costs: Any = None  # of a plan, PassCosts by which the phases are chosen; None: all passes cost the same
    lora: LoRA | None = None  # adapters, beside which all weights are frozen
    recompute_passes: bool = False  # keep the input of a pass only, and replay it in the backward


class RecursiveGPTModel(RecursionCore, GPTModel):
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
        self.reports_accuracy = False
        self.chosen_BS: Tensor | None = None  # of a plain model in evaluation, on the way out of Megatron's forward
        self.carried_states = None  # set by a training whose steps carry
        plan.layers_of(self.config.num_layers)  # refused before anything is built upon it
        self.__dict__["_blocks"] = {}  # stack -> decoder of its layers; past Module.__setattr__
        if not self.plan.is_plain:
            self._add_recursion()
        if config.lora is not None:
            add_adapters(self)

    def _add_recursion(self) -> None:
        plan = self.plan
        if plan.norms_before_heads and self.post_process:
            # The decoder must not norm each pass; its norm moves in front of the head, under its old checkpoint key.
            self.output_norm, self.decoder.final_layernorm = self.decoder.final_layernorm, None
        self.add_parameters(added_parameters(plan))
        if plan.trains_heads_only:
            heads = {each.key for each in added_parameters(plan) if each.is_head}
            for name, weight in self.named_parameters():
                weight.requires_grad_(name in heads)

    def weights_by_part(self) -> dict[str, set[torch.nn.Parameter]]:
        """The weights that each name given to :meth:`Uses.apart` stands for. A tied embedding belongs to two."""
        names = ["embedding", "output_norm", "output_layer", *MODULES]
        parts = {name.replace("_", " "): set(getattr(self, name).parameters()) for name in names if hasattr(self, name)}
        for stack, _ in self.plan.stacks:
            parts[part_of(stack)] = set(self.block_of(stack).parameters())
            if self.config.lora is not None and self.config.lora.per_pass:
                parts |= adapters_by_pass(self.block_of(stack), part_of(stack))
        if self.post_process and self.share_embeddings_and_output_weights:
            parts["output layer"].add(self.shared_embedding_or_output_weight())
        return parts

    # -- the four questions of the core ---------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token ids [B, S] to the scaled embedding [S, B, H]."""

        def lookup(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            embedding: Tensor = self._preprocess(input_ids=input_ids, position_ids=position_ids)[0]
            return embedding if self.plan.embedding_multiplier == 1.0 else embedding * self.plan.embedding_multiplier

        return self.uses.apart("embedding", lookup, input_ids, position_ids)

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
        stack: str = "core", closes: bool = False, documents: Documents | None = None, index: int = 0,
    ) -> Tensor:  # fmt: skip
        """One pass through a stack's layers of this stage. Off the first stage the decoder reads its own input tensor.

        ``closes``: the norm before the heads closes the pass too (``plan.closes``), on the last stage.
        ``index``: of the pass in the plan, by which layers that have an adapter for each pass choose.
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
                inference_context=inference_context, packed_seq_params=documents,
            )  # fmt: skip
            if block is not self.decoder:  # the decoder's own is its caller's to clear
                block.set_input_tensor(None)
            return result

        # Given as an argument: what the decoder holds by the time of the replay belongs to another pass.
        given_SBH = hidden_SBH if self.pre_process else self.decoder.input_tensor
        replayed = self.config.recompute_passes and torch.is_grad_enabled()
        function = partial(tensor_parallel.checkpoint, layers, False) if replayed else layers
        part = part_of(stack)
        if self.config.lora is not None and self.config.lora.per_pass:
            part = of_pass(part, index)
        result_SBH = self.uses.apart(part, function, given_SBH)
        if closes and hasattr(self, "output_norm"):
            result_SBH = self.final_norm(result_SBH)
        return result_SBH

    def final_norm(self, hidden_SBH: Tensor) -> Tensor:
        """The norm before the heads, on the last stage, where it does not close every pass in the decoder."""
        return self.uses.apart("output norm", self.output_norm, hidden_SBH)

    def project(self, hidden_SBH: Tensor, runtime_gather_output: bool | None = None) -> Tensor:
        """Logits [S, B, V], this rank's shard of V unless gathered."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV: Tensor
        logits_SBV, _ = self.output_layer(hidden_SBH, weight=weight, runtime_gather_output=runtime_gather_output)
        return logits_SBV

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        if self.plan.is_plain and self.reports_accuracy and not self.training:
            self.chosen_BS = vocab_parallel_argmax(logits.detach(), self.pg_collection.tp)
        loss_BS: Tensor = super().compute_language_model_loss(labels, logits)
        return loss_BS

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
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor | RecursiveOutput:
        """Run a plan.

        Args:
            input_ids, position_ids, labels: [B, S]. loss_mask: [B, S], 1 where a token counts; None counts all.
            attention_mask: boolean, True hides; None is causal.
            plan: of this forward, another one over the same stacks, states and heads; None is the model's own.
            packed_seq_params: the documents that samples hold, each of which sees itself alone.

        Returns:
            Without labels, the logits after the last block, [B, S, V] (this rank's shard of V unless gathered).
            With labels, a :class:`RecursiveOutput`; a disabled recursion returns what GPTModel does.
        """
        if self.plan.is_plain:
            output: Tensor = super().forward(
                input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask,
                runtime_gather_output=runtime_gather_output, packed_seq_params=packed_seq_params, **kwargs,
            )  # fmt: skip
            if self.chosen_BS is None or labels is None or loss_mask is None:
                return output
            right_BS, self.chosen_BS = torch.eq(self.chosen_BS, labels), None
            values = {"lm loss": output, "token accuracy": right_BS}
            return RecursiveOutput(output.float(), {k: masked(v, loss_mask.float()) for k, v in values.items()})
        unsupported = [name for name, value in kwargs.items() if value is not None]
        assert not unsupported, f"RecursiveGPTModel does not take {', '.join(unsupported)}"
        assert self.pre_process and self.post_process, "a recursive model on one pipeline stage only"
        return self.run(
            plan, input_ids, position_ids, attention_mask, labels, loss_mask, runtime_gather_output, packed_seq_params
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return adapt_sharded_state_dict(sharded, prefix)
