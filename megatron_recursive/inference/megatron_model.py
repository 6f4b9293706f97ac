"""The one adapter through which a Megatron checkpoint generates: Megatron's model behind transformers' ``generate``.

The checkpoint may have been written at any layout; it is read into one process, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from megatron_recursive.backends import cpu
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.configs import config_values
from megatron_recursive.hf.convert.donor_import import checkpoint_fetch
from megatron_recursive.hf.convert.export import MegatronModel, open_checkpoint
from megatron_recursive.hf.convert.mappings import OWN
from megatron_recursive.hf.convert.proof import build_megatron, checkpoint_key, one_process
from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
from megatron_recursive.hf.model.exits_recursive_gpt import ExitOptions, ExitReport, ExitRule, Work, left_by
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTOutput
from megatron_recursive.inference.pass_contexts import PassContexts
from megatron_recursive.models.recursion_state import RecursionState, run_plan
from megatron_recursive.plan import DecoderPass


class MegatronForCausalLM(PreTrainedModel, GenerationMixin):
    """A Megatron model of one process, with the interface of ``RecursiveGPTForCausalLM`` that generation needs.

    Prompts of a batch are padded on the left. Under an exit a prompt is read token by token, so that each token leaves
    after its own block; the others of its batch are computed on until the last has left.
    """

    config_class = RecursiveGPTConfig
    _supports_default_dynamic_cache = staticmethod(lambda: False)

    def __init__(self, config: RecursiveGPTConfig, megatron: Any) -> None:
        super().__init__(config)
        self.megatron = megatron
        self.last_exit_report: ExitReport | None = None
        self._open_report: ExitReport | None = None

    @property
    def device(self) -> torch.device:
        return next(self.megatron.parameters()).device

    def set_num_refinement_blocks(self, count: int) -> None:
        """Run so many blocks from now on."""
        lora = self.megatron.config.lora
        if lora is not None and lora.per_pass and count != self.megatron.plan.depth:
            raise ValueError("This model has an adapter for each pass, and none for those of another depth.")
        self.megatron.plan = self.megatron.plan.with_blocks(count)
        self.config.set_plan(self.megatron.plan)
        self.config.recursion = {**self.config.recursion, "max_inference_refinement_steps": count}

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PassContexts | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_blocks: bool = False,
        exit: str | None = None,
        halt_threshold: float | None = None,
        exit_threshold: float | None = None,
        exit_stable_blocks: int | None = None,
        max_inference_refinement_steps: int | None = None,
        **kwargs: Any,
    ) -> RecursiveGPTOutput:
        """As ``RecursiveGPTForCausalLM.forward``, of which it takes what generation gives.

        Without ``past_key_values`` this is the full forward of the Megatron model.
        """
        if input_ids.numel() and int(input_ids.max()) >= self.config.vocab_size:  # padding rows lie behind
            raise ValueError(f"The token id {int(input_ids.max())} is beyond the vocabulary of "
                             f"{self.config.vocab_size} tokens; tokenize with the model's own tokenizer.")  # fmt: skip
        options = ExitOptions.make(
            self.config, exit, halt_threshold=halt_threshold, exit_threshold=exit_threshold,
            exit_stable_blocks=exit_stable_blocks, max_inference_refinement_steps=max_inference_refinement_steps,
        )  # fmt: skip
        batch, length = input_ids.shape
        contexts = past_key_values
        if contexts is None and options is not None:
            contexts = PassContexts(length, self.megatron.plan.passes_per_block)
        if contexts is not None:
            blocks = self.megatron.plan.num_blocks if options is None else options.max_blocks
            contexts.ensure_passes(blocks * contexts.passes_per_block, batch)
        past = 0 if contexts is None else contexts.length
        hidden_BK = None if attention_mask is None or bool(attention_mask.all()) else ~attention_mask.bool()
        if options is None:
            states, taken_BS = self._run(input_ids, contexts, hidden_BK), None
        else:
            assert contexts is not None
            work = Work(fixed_depth=(batch * length, batch * length * (past + length)))
            steps = [self._run_token(input_ids[:, s : s + 1], contexts, hidden_BK, options, work)
                     for s in range(length)]  # fmt: skip
            most = max(len(states) for states, _ in steps)
            padded = [states + states[-1:] * (most - len(states)) for states, _ in steps]
            states = [torch.cat(tokens) for tokens in zip(*padded, strict=True)]
            taken_BS = torch.cat([taken for _, taken in steps], dim=1)
        result = RecursiveGPTOutput(past_key_values=past_key_values, blocks=taken_BS)
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        result.logits = self._logits(states[-1][kept])
        if output_blocks:
            result.block_logits = torch.stack([self._logits(state[kept]) for state in states])
            if self.megatron.plan.has_halting:
                result.block_halting = torch.stack([torch.sigmoid(self._halting(state[kept])) for state in states])
            elif self.megatron.plan.exit_gate:
                leaving = torch.stack([self._halting(state[kept]) for state in states])
                result.block_halting = left_by(leaving, self.megatron.plan.num_blocks)
        if options is not None and taken_BS is not None and contexts is not None:
            report = ExitReport(self.config) if self._open_report is None else self._open_report
            work.logits = result.logits.shape[:2].numel()
            report.add(options, taken_BS, work, decoded=past > 0)
            self.last_exit_report = report
        return result

    def _start(
        self, input_ids: Tensor, contexts: PassContexts | None, hidden_BK: Tensor | None
    ) -> tuple[RecursionState, Tensor | None]:
        """States and attention mask (True hides a key) of the next tokens; ``hidden_BK`` tells which are padding."""
        start = 0 if contexts is None else contexts.length
        stop = start + input_ids.shape[1]
        positions, mask = torch.arange(start, stop, device=input_ids.device)[None].expand_as(input_ids), None
        if hidden_BK is not None:
            positions = ((~hidden_BK).long().cumsum(-1) - 1).clamp(min=0)[:, start:stop]
            # Padding sees what stands before it: nothing at all would be a softmax over nothing.
            mask = hidden_BK[:, None, None, :stop] & ~hidden_BK[:, None, start:stop, None]
        return self.megatron.initial_state(self.megatron.embed(input_ids, positions), input_ids, positions), mask

    def _run(self, input_ids: Tensor, contexts: PassContexts | None, hidden_BK: Tensor | None) -> list[Tensor]:
        """Every pass of the plan; the output state after each block, [S, B, H]."""
        state, mask = self._start(input_ids, contexts, hidden_BK)

        def decode(each: DecoderPass, hidden_SBH: Tensor) -> Tensor:
            return self.megatron.decode(
                hidden_SBH, mask, None if contexts is None else contexts.contexts[each.index], stack=each.stack,
                closes=self.megatron.plan.closes(each), index=each.index,
            )  # fmt: skip

        states = [state.output for _ in run_plan(self.megatron.plan, state, decode)]
        if contexts is not None:
            contexts.advance(input_ids.shape[1])
        return states

    def _run_token(
        self, input_ids: Tensor, contexts: PassContexts, hidden_BK: Tensor | None, options: ExitOptions, work: Work
    ) -> tuple[list[Tensor], Tensor]:
        """Blocks until every sequence's one token has left: output states [1, B, H] after each, and blocks [B, 1].

        A sequence that has left keeps its state; what is computed for it beside the others is thrown away.
        """
        plan, per_block = self.megatron.plan, self.megatron.plan.passes_per_block
        rule = ExitRule(options, self._halting_of_tokens, self._logits_of_tokens, work)
        state, mask = self._start(input_ids, contexts, hidden_BK)
        final_BH = torch.empty_like(state.values["input"][0])  # of a state that starts at it there is no output yet
        staying_B = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        real_B = staying_B if hidden_BK is None else ~hidden_BK[:, contexts.length]
        blocks_B = torch.zeros_like(staying_B, dtype=torch.long)
        states, layers, batch = [], self.config.layers_per_block, len(input_ids)
        adapted_of_block = self.config.adapted_layers(options.max_blocks)
        for block in range(options.max_blocks):
            for number in range(block * per_block, (block + 1) * per_block):
                each, context = plan.known(number), contexts.contexts[number]
                state.update(each, self.megatron.decode(state.gather(each), mask, context, stack=each.stack,
                                                        closes=plan.closes(each), index=each.index))  # fmt: skip
            work.add(layers * batch, layers * batch * (contexts.length + 1), adapted_of_block[block] * batch)
            final_BH = torch.where(staying_B[:, None], state.output[0], final_BH)
            states.append(final_BH[None])
            blocks_B += staying_B
            if block + 1 == options.max_blocks:
                break
            left_B = rule(state.output[0], self.megatron._final_state(state.output, True)[0])
            staying_B = staying_B & real_B & ~left_B
            if not staying_B.any():
                break
        contexts.fill_skipped(blocks_B)
        contexts.advance(1)
        return states, (blocks_B * real_B)[:, None]

    def _logits(self, state_SBH: Tensor) -> Tensor:
        """[B, S, V] over the true vocabulary: rows of padding say nothing."""
        return self.megatron.logits_BSV(state_SBH)[..., : self.config.vocab_size]

    def _halting(self, state_SBH: Tensor) -> Tensor:
        return self._token_head(self.megatron._final_state(state_SBH, True))

    def _halting_of_tokens(self, read_NH: Tensor) -> Tensor:
        return self._token_head(read_NH[None])[:, 0]

    @property
    def _token_head(self) -> Any:
        return self.megatron.exit_gate if self.megatron.plan.exit_gate else self.megatron.halting_head

    def _logits_of_tokens(self, state_NH: Tensor) -> Tensor:
        return self._logits(state_NH[None])[:, 0]

    # -- what transformers' generate asks ------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._open_report, self.last_exit_report = ExitReport(self.config), None
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._open_report = None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = PassContexts(max_cache_length + 1, self.megatron.plan.passes_per_block)


@contextlib.contextmanager
def open_megatron(given: str, dtype: torch.dtype | None = None) -> Iterator[tuple[MegatronForCausalLM, MegatronModel]]:
    """The model of a checkpoint folder, in a world of one process for as long as the context lasts.

    Args:
        dtype: of the weights; None takes the widest that the checkpoint holds.

    Raises:
        UserError: it cannot be read, or its arguments describe something else than its tensors.
    """
    cpu.install()
    found = open_checkpoint(given)
    stored = max((found.checkpoint.dtypes[item.key] for item in found.items()), key=lambda each: each.itemsize)
    dtype = stored if dtype is None else dtype
    with one_process():
        megatron = build_megatron(found.arch, found.recursion, dtype, lora=found.lora)
        _fill(megatron, found, given)
        if torch.cuda.is_available() and not cpu.is_installed():
            megatron.cuda()
        megatron.eval()
        lora = found.lora if found.lora is not None and found.lora.per_pass else None
        config = RecursiveGPTConfig.from_dict({
            **config_values(OWN, found.arch), "dtype": dtype,
            "pass_adapters": lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)},
            "plan": json.loads(found.plan.to_json()), "recursion": found.recursion.to_dict(),
        })  # fmt: skip
        yield MegatronForCausalLM(config, megatron).eval(), found


def _fill(megatron: Any, found: MegatronModel, given: str) -> None:
    fetch = checkpoint_fetch(found.checkpoint)
    tensors = dict(megatron.named_parameters())
    tensors.update((n, b) for n, b in megatron.named_buffers() if n.startswith("initial_"))
    for name, target in tensors.items():
        try:
            stored = fetch(checkpoint_key(name))
        except KeyError as error:
            raise UserError(f"The checkpoint {given} lacks {checkpoint_key(name)}; name another one.") from error
        if stored.shape != target.shape:
            raise UserError(
                f"The checkpoint {given} has {checkpoint_key(name)} as {tuple(stored.shape)}, where its arguments "
                f"describe {tuple(target.shape)}; name another one."
            )
        target.data.copy_(stored)
