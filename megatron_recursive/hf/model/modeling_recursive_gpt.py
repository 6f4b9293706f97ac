"""Recursive GPTs in transformers: layers that are applied once per pass of the config's plan.

Ships inside an export, so that ``AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`` works without the
package that trained the model; it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .added_parameters import COMBINING, EVERY, MOVING, SEED, added_parameters, sampled_start, start_of
from .cache_recursive_gpt import RecursiveCache, check_filled
from .configuration_recursive_gpt import RecursiveGPTConfig
from .exits_recursive_gpt import ExitOptions, ExitReport, ExitRule, left_by, run_with_exits
from .generation_recursive_gpt import RecursiveGenerationMixin
from .layers_recursive_gpt import (
    COMBINING_MODULES,
    MOVING_MODULES,
    RecursiveGPTAttention,
    RecursiveGPTDecoderLayer,
    RecursiveGPTNorm,
    RecursiveGPTRotaryEmbedding,
    make_norm,
)
from .outputs_recursive_gpt import RecursiveGPTModelOutput, RecursiveGPTOutput
from .recursion_plan import STATES, DecoderPass, RecursionPlan

MODEL = "model."  # before the names of what the base model holds


def slice_positions(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """As ``slice_logits_to_keep`` of transformers 5.21, which engines that need an older one lack."""
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    if keep.ndim == 1:
        return hidden[:, keep]
    if keep.dtype == torch.bool:
        return hidden[keep]
    return hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))


# --- models ---------------------------------------------------------------------------------------------------------


class RecursiveGPTPreTrainedModel(PreTrainedModel):
    config: RecursiveGPTConfig
    config_class = RecursiveGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecursiveGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": RecursiveGPTDecoderLayer, "attentions": RecursiveGPTAttention}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As everywhere; the card and the code of the folder that the model was loaded from go along.

        The folder's code is the one that loads it: a registered class of the package would leave files that need it.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        source, target = Path(self.name_or_path), Path(save_directory)
        if self.name_or_path and source.is_dir() and kwargs.get("is_main_process", True):
            for file in (source / "README.md", *source.glob("*.py")):
                there = target / file.name
                if file.is_file() and not (there.exists() and (file.suffix != ".py" or there.samefile(file))):
                    shutil.copyfile(file, there)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecursiveGPTNorm):
            if module.weight is not None:
                (init.zeros_ if module.one_centered else init.ones_)(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Also what recursion adds, which transformers passes over where a module holds no parameter itself."""
        super().initialize_weights()
        for module in (each for each in {self, self.base_model} if not hasattr(each, "added_started")):
            module.added_started = True
            generator = torch.Generator(device="cpu").manual_seed(SEED)
            knobs = SimpleNamespace(**{"halt_bias": -5.0, **self.config.recursion})
            for each in added_parameters(self.config.recursion_plan):
                if each.exported.startswith(MODEL) != isinstance(module, RecursiveGPTModel):
                    continue
                parameter, start = module.get_parameter(each.exported.removeprefix(MODEL)), start_of(each, knobs)
                if start == "trunc-normal":
                    vector = torch.empty(parameter.shape, device="cpu")
                    init.copy_(parameter, nn.init.trunc_normal_(vector, std=1.0, a=-2.0, b=2.0, generator=generator))
                elif start in ("identity", "identity at the end"):
                    rows, ones = len(parameter), torch.eye(parameter.shape[1])
                    init.copy_(parameter, ones[:rows] if start == "identity" else ones[-rows:])
                else:
                    init.constant_(parameter, float(start))


class RecursiveGPTModel(RecursiveGPTPreTrainedModel):
    """Embedding, the passes of the plan, final norm."""

    _keys_to_ignore_on_load_unexpected = [  # it runs all blocks and asks no head
        f"^{re.escape(each.exported)}$" for each in EVERY if not each.exported.startswith(MODEL)
    ]

    def __init__(self, config: RecursiveGPTConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(RecursiveGPTDecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = RecursiveGPTRotaryEmbedding(config) if config.position_embedding == "rope" else None
        self.frozen = [each for each in added_parameters(config.recursion_plan) if not each.trained]
        for each in self.frozen:  # parameters, since engines that load weights by name know no buffers
            start = nn.Parameter(torch.zeros(each.sizes(config.hidden_size)), requires_grad=False)
            setattr(self, each.exported.removeprefix(MODEL), start)
        for word in config.recursion_plan.maps:
            setattr(self, COMBINING[word][0].module, COMBINING_MODULES[word](config.hidden_size))
        for word in config.recursion_plan.moves:
            setattr(self, MOVING[word].module, MOVING_MODULES[word](config))
        self.gradient_checkpointing = False
        self._read_plan()
        self.post_init()

    def train(self, mode: bool = True) -> RecursiveGPTModel:
        """As everywhere. Initial states are never trained, though from_pretrained makes every parameter trainable."""
        for each in self.frozen:
            self.get_parameter(each.exported.removeprefix(MODEL)).requires_grad_(False)
        return super().train(mode)

    def _read_plan(self, plan: RecursionPlan | None = None) -> None:
        """Go by the config's plan, or by another one over the same stacks and states."""
        plan = self.config.recursion_plan if plan is None else plan
        self.plan, self.passes = plan, plan.passes
        self.block_ends = {each.index: each for each in plan.block_ends}
        self.embedding_multiplier = float(plan.embedding_multiplier)
        self.norms_before_heads, self.closes = plan.norms_before_heads, [plan.closes(each) for each in plan.passes]
        self.starts_at_input, self.samples_start = plan.starts_at_input, plan.samples_start
        self.state_std, self.has_inner_depth = plan.state_std, plan.has_inner_depth
        stacks = plan.layers_of(self.config.num_layers)
        self.layers_of_pass = [stacks[each.stack] for each in self.passes]

    def ensure_passes(self, count: int, *, renew: bool = False) -> None:
        """Have attention modules for at least so many passes."""
        layers: Any = self.layers
        for layer in layers:
            layer.self_attn.ensure_passes(count, renew=renew)

    def run_pass(self, index: int, state: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = state
        known = self.plan.known(index).index
        for layer in self.layers_of_pass[known]:
            hidden_states = self.layers[layer](hidden_states, pass_index=index, adapter=known, **kwargs)
        hidden_states = self.norm(hidden_states) if self.closes[known] else hidden_states
        return hidden_states.to(state.device)  # back from the last layer's, where layers are spread over devices

    def read_state(self, state: Tensor) -> Tensor:
        """What the heads see of an output state."""
        return self.norm(state).to(state.device) if self.norms_before_heads else state

    def initial_states(self, embedding: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        states = {"input": embedding}
        for name in STATES:
            vector = getattr(self, f"initial_{name}", None)
            states[name] = torch.zeros_like(embedding) if vector is None else vector.to(embedding).expand_as(embedding)
        if self.starts_at_input:
            states["output"] = embedding
        elif self.samples_start:
            draw: Any = 0
            if self.training:  # by place in the batch; otherwise by position alone
                like = embedding[..., 0]
                position_ids = torch.arange(like.numel(), device=like.device).view(like.shape)
                draw = torch.randint(2**31, (1,), device=embedding.device)
            start = sampled_start(position_ids, embedding.shape[-1], self.state_std, draw)
            states["output"] = start.to(embedding).expand_as(embedding)
        return states

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor, past: int | Tensor
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.position_embedding == "learned":
            hidden = hidden + self._learned(position_ids, past + hidden.shape[1])
        return hidden if self.embedding_multiplier == 1.0 else hidden * self.embedding_multiplier

    def _learned(self, position_ids: Tensor, tokens: int | Tensor) -> Tensor:
        limit = self.config.max_position_embeddings
        try:  # a GPU raises nothing that could be caught, but reading its positions at every step would slow it down
            if isinstance(tokens, int) and tokens > limit and int(position_ids.max()) >= limit:
                raise IndexError
            return self.embed_positions(position_ids)
        except IndexError as error:
            low, high = int(position_ids.min()), int(position_ids.max())
            raise ValueError(
                f"This model has {limit} learned positions, but position {low if low < 0 else high} was asked for; "
                "shorten the text."
            ) from error

    def _positions(self, given: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> Tensor:
        length = given.shape[1]
        counts = self.config.position_embedding == "learned" or self.samples_start  # what padding must not shift
        if counts and attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=given.device) + past).unsqueeze(0)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_block_states: bool = False,
        exit_rule: ExitRule | None = None,
        walk: Callable[..., list[Tensor]] | None = None,
        **kwargs: Any,
    ) -> RecursiveGPTModelOutput:
        """``walk`` stands in for ``_run_plan``: whoever measures runs the passes in an order of its own."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config) if exit_rule is None else RecursiveCache(self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self._positions(given, attention_mask, past)
        embedding = self._embed(input_ids, inputs_embeds, position_ids, past)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=embedding, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        shared = {
            "attention_mask": causal_mask,
            "position_embeddings": self.rotary_emb(embedding, position_ids) if self.rotary_emb is not None else None,
            "past_key_values": past_key_values,
            **kwargs,
        }
        states, blocks = self.initial_states(embedding, position_ids), None
        if exit_rule is None:
            check_filled(past_key_values, self.config.num_hidden_layers, whole=self.has_inner_depth)
            kept = (walk or self._run_plan)(states, output_block_states, {"position_ids": position_ids, **shared})
        else:
            kept, blocks = run_with_exits(self, states, attention_mask, exit_rule, output_block_states, shared)
        return RecursiveGPTModelOutput(
            last_hidden_state=self.read_state(states["output"]),
            past_key_values=past_key_values,
            block_states=tuple(kept) if output_block_states else None,
            blocks=blocks,
        )

    def _run_plan(
        self, states: dict[str, Tensor], keeps_states: bool, shared: dict[str, Any], first: int = 0,
        stop: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Run every pass, or some, on ``states``, in place; the output state after each block, if it is to be kept."""
        kept = []
        for index, each in enumerate(self.passes[first:stop], first):
            if each.cuts_states:
                states.update({name: states[name].detach() for name in STATES})
            with torch.set_grad_enabled(each.grad and torch.is_grad_enabled()):
                result = self.run_pass(index, self.gather(each, states), **shared)
                result = states[each.target] = self.moved(each, states, result)
            if each.target == "input" and self.starts_at_input:  # a prelude, which comes first
                states["output"] = result
            if index in self.block_ends and keeps_states:
                kept.append(states["output"])
        return kept

    def gather(self, each: DecoderPass, states: dict[str, Tensor]) -> Tensor:
        """What a pass is given."""
        total = states[each.reads[0]]
        if each.combine != "sum":
            given: tuple[Tensor, ...] = (total, states[each.reads[1]])
            given = (torch.cat(given, dim=-1),) if each.combine == "concat" else given
            combined: Tensor = getattr(self, COMBINING[each.combine][0].module)(*given)
            return combined.to(total.device)
        for name in each.reads[1:]:
            total = total + states[name]
        return total

    def moved(self, each: DecoderPass, states: dict[str, Tensor], result: Tensor) -> Tensor:
        """What the target of a pass becomes by its result."""
        if each.replaces_state:
            return result
        others = [states[name] for name in each.moved_with]
        if each.move != "step":
            moved: Tensor = getattr(self, MOVING[each.move].module)(result, *others)
            return moved.to(result.device)
        return others[0] + each.step * (result - others[0])


class RecursiveGPTTokenHead(nn.Linear):
    """The halting head or exit gate: computes in fp32, whatever it is stored in; a module, which adapters and device
    maps reach."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class RecursiveGPTForCausalLM(RecursiveGPTPreTrainedModel, RecursiveGenerationMixin):
    """The model with its heads. ``last_exit_report`` says what the last call with an exit cost."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RecursiveGPTConfig) -> None:
        super().__init__(config)
        self.model, self.vocab_size = RecursiveGPTModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        plan = config.recursion_plan
        self.halting_head = RecursiveGPTTokenHead(config.hidden_size, 1) if plan.has_halting else None
        self.exit_gate = RecursiveGPTTokenHead(config.hidden_size, 1) if plan.exit_gate else None
        exact = [each.exported for each in added_parameters(plan) if each.in_fp32]
        if exact:
            # What quantisation leaves alone, by module; and by name, since no name may be in both.
            self._keep_in_fp32_modules = sorted({name.rpartition(".")[0] for name in exact})
            self._keep_in_fp32_modules_strict = exact
        self.last_exit_report: ExitReport | None = None
        self._open_report: ExitReport | None = None
        self.post_init()
        self.generation_config._from_model_config = None  # see adjust_generation_fn

    def halting_logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [...], in fp32: q = w . h + b of each token's own state, by the halting head or the exit gate."""
        head = self.exit_gate if self.halting_head is None else self.halting_head
        assert head is not None
        return head(hidden).squeeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_blocks: bool = False,
        exit: str | None = None,
        halt_threshold: float | None = None,
        exit_threshold: float | None = None,
        exit_stable_blocks: int | None = None,
        max_inference_refinement_steps: int | None = None,
        **kwargs: Any,
    ) -> RecursiveGPTOutput:
        """Run the plan and read the heads.

        Args:
            labels: [B, S], as input_ids; shifted here, -100 does not count. ``shift_labels``, a further keyword, are
                shifted already; named as an argument, the trainer would take them for labels that a row must have.
            num_items_in_batch: what the loss is divided by, instead of the number of labels that count.
            output_blocks: also return what the heads say after every block.
            exit: ``halting``, ``quantile``, ``output-change``, ``kl`` or ``argmax``; None runs all blocks of the plan.
                The other exit arguments are described in :class:`ExitOptions`.
        """
        options = ExitOptions.make(
            self.config, exit, halt_threshold=halt_threshold, exit_threshold=exit_threshold,
            exit_stable_blocks=exit_stable_blocks, max_inference_refinement_steps=max_inference_refinement_steps,
        )  # fmt: skip
        if options is not None and self.training:
            raise ValueError("An exit is for inference; call model.eval() first.")
        rule = None if options is None else ExitRule(options, self.halting_logits, self._logits_of_state)
        shift_labels = kwargs.pop("shift_labels", None)
        wanted = labels is not None or shift_labels is not None
        if use_cache is None and self.training:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_block_states=output_blocks or (wanted and options is None), exit_rule=rule, **kwargs,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        found: dict[str, Any] = {}  # a ModelOutput's fields have the order in which they are set: all of them at once
        if not wanted:
            logits = self.lm_head(slice_positions(hidden, logits_to_keep))
        else:
            logits = self.lm_head(hidden)
            if shift_labels is None:
                assert labels is not None
                shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
            states = outputs.block_states if options is None else ()
            found |= self._read_losses(states, hidden, logits, shift_labels, num_items_in_batch)
            logits = slice_positions(logits, logits_to_keep)
        if output_blocks:
            found |= self._read_blocks(outputs.block_states, logits_to_keep)
        if rule is not None:
            self._report(rule, outputs, math.prod(logits.shape[:-1]))
        return RecursiveGPTOutput(
            logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, blocks=outputs.blocks, **found,
        )  # fmt: skip

    def _logits_of_state(self, state: Tensor) -> Tensor:
        return self.lm_head(self.model.read_state(state))

    @torch.no_grad()
    def _read_blocks(self, states: tuple[Tensor, ...], keep: int | Tensor) -> dict[str, Tensor]:
        hidden = [self.model.read_state(slice_positions(state, keep)) for state in states]
        found = {"block_logits": torch.stack([self.lm_head(each) for each in hidden])}
        if self.halting_head is not None:
            found["block_halting"] = torch.stack([torch.sigmoid(self.halting_logits(each)) for each in hidden])
        elif self.exit_gate is not None:
            leaving = torch.stack([self.halting_logits(each) for each in hidden])
            found["block_halting"] = left_by(leaving, self.config.num_refinement_blocks)
        return found

    def _read_losses(
        self, states: tuple[Tensor, ...], hidden: Tensor, logits: Tensor, labels: Tensor, count: int | Tensor | None
    ) -> dict[str, Tensor]:
        """The training objective, as the plan weighs the blocks; without states (an exit), the loss of the answers."""
        labels = labels.to(logits.device).contiguous()
        valid = (labels != -100).float()
        count = valid.sum().clamp(min=1) if count is None else count

        def cross_entropy(block_logits: Tensor) -> Tensor:
            return self.loss_function(block_logits, None, self.config.vocab_size, count, shift_labels=labels)

        lm_loss = cross_entropy(logits)
        if not states:
            return {"loss": lm_loss, "lm_loss": lm_loss.detach()}
        if self.exit_gate is not None:
            expected = self._expected_loss(states, hidden, logits, labels)
            return {"loss": (expected * valid).sum() / count, "lm_loss": lm_loss.detach()}
        ends = list(self.model.block_ends.values())
        loss = ends[-1].supervised_weight * lm_loss
        halt_loss = torch.zeros_like(lm_loss)
        last_choice = logits.detach().argmax(-1)
        for each, state in zip(ends, states, strict=True):
            is_last, block_logits, seen = each is ends[-1], logits, hidden
            if not is_last and each.supervised_weight:
                seen = self.model.read_state(state)
                block_logits = self.lm_head(seen)
                loss = loss + each.supervised_weight * cross_entropy(block_logits)
            elif not is_last and each.halt_weight:
                with torch.no_grad():
                    seen = self.model.read_state(state)
                    block_logits = self.lm_head(seen)
            if each.halt_weight:
                choice = block_logits.detach().argmax(-1)
                correct = self.config.recursion.get("halt_target", "correct") == "correct"
                goal = choice.eq(labels if correct else last_choice).float()
                asked = self.halting_logits(seen if is_last else seen.detach()).to(goal.device)
                losses = F.binary_cross_entropy_with_logits(asked, goal, reduction="none")
                halt_loss = halt_loss + each.halt_weight * (losses * valid).sum() / count
        found = {"lm_loss": lm_loss.detach()}
        if self.halting_head is not None:
            found["halt_loss"] = halt_loss.detach()
            loss = loss + self.config.recursion.get("halt_loss_weight", 1.0) * halt_loss
        return {"loss": loss, **found}

    def _expected_loss(self, states: tuple[Tensor, ...], hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, S]: the losses of the loops by the probabilities of leaving after them, less their weighed entropy."""
        weight = self.config.recursion.get("exit_entropy_weight", 0.1)
        total, stays = torch.zeros(labels.shape, device=logits.device), torch.zeros(labels.shape, device=logits.device)
        for each, state in zip(self.model.block_ends.values(), states, strict=True):
            is_last = each is self.model.passes[-1]
            seen = hidden if is_last else self.model.read_state(state)
            block_logits = logits if is_last else self.lm_head(seen)
            loss = F.cross_entropy(block_logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            log_p, asked = stays, None if is_last else self.halting_logits(seen).to(stays.device)
            if asked is not None:
                log_p, stays = stays + F.logsigmoid(asked), stays + F.logsigmoid(-asked)
            total = total + log_p.exp() * (each.supervised_weight * loss.view_as(labels) + weight * log_p)
        return total


__all__ = ["RecursiveGPTForCausalLM", "RecursiveGPTModel", "RecursiveGPTPreTrainedModel"]
