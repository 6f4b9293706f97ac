"""Leaving the recursion early at inference: when a token leaves, what it owes to later tokens, what it saves.

Ships inside an export: it imports torch and transformers alone.

**The policy for skipped passes.** A token that leaves after block b keeps its states, and for every pass of every later
block it provides the keys and values that it computed in block b at the same place of the block (same layer, same pass
counted from the block's start). This depends on the token and on earlier ones alone, so a prompt read at once, tokens
decoded one by one and a forward without a cache agree. Later tokens attend to it in their deeper blocks as usual.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_recursive_gpt import RecursiveCache

if TYPE_CHECKING:
    from .configuration_recursive_gpt import RecursiveGPTConfig

logger = logging.get_logger(__name__)

EXITS = ("halting", "output-change", "kl", "argmax")
EXIT_ARGUMENTS = ("exit", "halt_threshold", "exit_threshold", "exit_stable_blocks", "max_inference_refinement_steps")
_THRESHOLDS = {"output-change": 0.03, "kl": 1e-3}


@dataclass(frozen=True)
class ExitOptions:
    """When a token leaves. It is asked after each block, and leaves at the latest after ``max_blocks``.

    Attributes:
        exit: ``halting``: its halting probability is at least ``halt_threshold``. The others need no training, and
            compare with the block before: ``output-change``: its output state changed by less than ``exit_threshold``
            (relative L2); ``kl``: KL(this block's next-token distribution || the one before) is below it (nats);
            ``argmax``: the last ``exit_stable_blocks`` blocks have the same most likely token.
        max_blocks: from ``max_inference_refinement_steps``. Not given, it is the config's, but at most the T blocks of
            the plan; given, it may exceed T, and the last block's passes are then repeated.
    """

    exit: str
    halt_threshold: float
    exit_threshold: float
    exit_stable_blocks: int
    max_blocks: int
    trained_blocks: int

    @classmethod
    def make(
        cls, config: RecursiveGPTConfig, exit: str | None, *, halt_threshold: float | None = None,
        exit_threshold: float | None = None, exit_stable_blocks: int | None = None,
        max_inference_refinement_steps: int | None = None,
    ) -> ExitOptions | None:  # fmt: skip
        """None where no exit is asked for. A ValueError says in a sentence what cannot be."""
        if exit is None or exit == "none":
            return None
        if exit not in EXITS:
            raise ValueError(f"exit must be one of {', '.join(EXITS)}, but is {exit}.")
        plan = config.recursion_plan
        blocks = [[(p.target, p.reads) for p in plan.passes if p.block == block] for block in range(plan.num_blocks)]
        if plan.is_plain or any(block != blocks[0] for block in blocks):
            raise ValueError(f"exit={exit} needs a plan of refinement blocks that are alike, which this model has not.")
        if exit == "halting" and not plan.has_halting:
            raise ValueError("exit=halting needs a halting head, which this model was trained without.")
        knobs, trained = config.recursion, len(blocks)
        threshold = knobs.get("halt_threshold", 0.5) if halt_threshold is None else halt_threshold
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"halt_threshold must lie strictly between 0 and 1, but is {threshold}.")
        change = _THRESHOLDS.get(exit, 0.0) if exit_threshold is None else exit_threshold
        stable = 2 if exit_stable_blocks is None else exit_stable_blocks
        cap = max_inference_refinement_steps
        if cap is None:
            cap = min(trained, knobs.get("max_inference_refinement_steps", trained))
        for name, value, least in (("exit_threshold", change, 0), ("exit_stable_blocks", stable, 2),
                                   ("max_inference_refinement_steps", cap, 1)):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}.")
        if cap > trained:
            logger.warning_once(
                f"max_inference_refinement_steps {cap} is beyond the {trained} blocks that the model was trained with."
            )
        return cls(exit, threshold, change, stable, cap, trained)


class ExitRule:
    """Asks the tokens that are still there after each block; for one forward."""

    def __init__(
        self, options: ExitOptions, halting_logits: Callable[[Tensor], Tensor], logits_of: Callable[[Tensor], Tensor]
    ) -> None:
        self.options, self.halting_logits, self.logits_of = options, halting_logits, logits_of
        self.before: Tensor | None = None  # [N, ...]: what the block before gave, for the tokens that are still there
        self.stable_N: Tensor | None = None  # how many blocks in a row had the same arg-max

    def __call__(self, state_NH: Tensor, read_NH: Tensor) -> Tensor:
        """Which of the tokens leave, [N], given their output state (as the passes and as the heads see it)."""
        kind, before = self.options.exit, self.before
        if kind == "halting":
            return torch.sigmoid(self.halting_logits(read_NH)) >= self.options.halt_threshold
        if kind == "output-change":
            self.before = now = state_NH.float()
            if before is None:
                return self._nobody(state_NH)
            return (now - before).norm(dim=-1) < self.options.exit_threshold * now.norm(dim=-1)
        logits_NV = self.logits_of(state_NH).float()
        if kind == "kl":
            self.before = log_p = F.log_softmax(logits_NV, dim=-1)
            if before is None:
                return self._nobody(state_NH)
            return (log_p.exp() * (log_p - before)).sum(-1) < self.options.exit_threshold
        self.before = choice_N = logits_NV.argmax(-1)
        if before is None or self.stable_N is None:
            self.stable_N = torch.ones_like(choice_N)
        else:
            self.stable_N = torch.where(choice_N == before, self.stable_N + 1, 1)
        return self.stable_N >= self.options.exit_stable_blocks

    @staticmethod
    def _nobody(state_NH: Tensor) -> Tensor:
        return torch.zeros(len(state_NH), dtype=torch.bool, device=state_NH.device)

    def keep(self, index: Tensor) -> None:
        """Go on with these of the tokens."""
        self.before = None if self.before is None else self.before[index]
        self.stable_N = None if self.stable_N is None else self.stable_N[index]


class TokensOfPass:
    """The tokens that a pass computes, and how they meet the keys and values of those that have left.

    Hidden states hold the N tokens that are still there as [1, N, H] (all of them as [B, S, H] while nobody has left).
    Attention alone sees the whole batch: keys and values of those that have left come from the block before.
    """

    def __init__(self, shape: tuple[int, int], slots_per_block: int) -> None:
        self.shape, self.slots_per_block = shape, slots_per_block
        self.index: Tensor | None = None  # [N] of B * S; None: all
        self.rows: list[slice] | None = None  # runs of sequences that are still there, where each has one token
        self.new: dict[int, tuple[Tensor, Tensor]] = {}  # slot within a block -> keys, values [B, heads, S, D]

    def keep(self, index: Tensor) -> None:
        """Go on with these of the tokens, [N] of B * S."""
        self.index = index
        if self.shape[1] == 1:
            self.rows, rows = [], index.tolist()
            for row in rows:
                if self.rows and self.rows[-1].stop == row:
                    self.rows[-1] = slice(self.rows[-1].start, row + 1)
                else:
                    self.rows.append(slice(row, row + 1))

    def place(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens, as attention needs them; and remember keys and values."""
        slot = layer_idx % self.slots_per_block
        if self.index is not None and self.rows is not None:  # [1, heads, N, D] -> [N, heads, 1, D]
            query, key, value = (each.transpose(0, 2) for each in (query, key, value))
            old_key, old_value = self.new[slot]
            index = self.index.to(key.device)
            key, value = old_key.index_copy(0, index, key), old_value.index_copy(0, index, value)
        elif self.index is not None:
            old_key, old_value = self.new[slot]
            nobody = query.new_zeros(self.shape[0], query.shape[1], self.shape[1], query.shape[3])
            query, key, value = self._spread(nobody, query), self._spread(old_key, key), self._spread(old_value, value)
        self.new[slot] = key, value
        return query, key, value

    def _spread(self, old: Tensor, new: Tensor) -> Tensor:
        """``old`` [B, heads, S, D] with ``new`` [1, heads, N, D] in the tokens' places."""
        assert self.index is not None
        whole = old.transpose(1, 2).flatten(0, 1).index_copy(0, self.index.to(old.device), new[0].transpose(0, 1))
        return whole.unflatten(0, self.shape).transpose(1, 2)

    def pick(self, result: Tensor) -> Tensor:
        """Of attention's [B, S, heads, D], the tokens that are still there, [1, N, heads, D]."""
        return result if self.index is None else result.flatten(0, 1)[self.index.to(result.device)].unsqueeze(0)

    def attend_rows(
        self, attend: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, settings: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Attention of the sequences that are still there, on views of the cache: nothing is copied for the others."""
        assert self.rows is not None
        results, start = [], 0
        for rows in self.rows:
            stop = start + rows.stop - rows.start
            mask_of = mask if mask is None or mask.shape[0] == 1 else mask[rows]
            results.append(attend(module, query[start:stop], key[rows], value[rows], mask_of, **settings)[0])
            start = stop
        return torch.cat(results).transpose(0, 1)


@torch.no_grad()
def run_with_exits(
    model: Any, states: dict[str, Tensor], attention_mask: Tensor | None, rule: ExitRule, keeps_states: bool,
    shared: dict[str, Any],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Run blocks until every token has left. ``states["output"]`` becomes the state that each token left with.

    Args:
        model: the base model. states: [B, S, H] each. shared: what every layer is given.

    Returns:
        The output states after each block that ran (if they are to be kept), and [B, S] blocks run (0: padding).
    """
    if shared.get("output_attentions") or shared.get("output_hidden_states"):
        raise ValueError("output_attentions and output_hidden_states need all blocks; they do not go with an exit.")
    if not isinstance(shared["attention_mask"], Tensor | None):
        raise ValueError("An exit does not work with flex_attention; use sdpa or eager.")
    config, passes, options = model.config, model.passes, rule.options
    per_block = len(passes) // options.trained_blocks
    batch, length = states["input"].shape[:2]
    tokens = TokensOfPass((batch, length), per_block * config.num_layers)
    cache, rotary = shared["past_key_values"], shared["position_embeddings"]
    _open_cache(cache, config, options, tokens.slots_per_block)
    if rotary is not None:
        rotary = tuple(each.expand(batch, -1, -1) for each in rotary)
    final, kept = states["output"], []
    blocks_N = torch.zeros(batch * length, dtype=torch.long, device=final.device)
    real_N = real_and_visible(attention_mask, blocks_N.view(batch, length), _seen(cache))[0].flatten()
    index = torch.arange(batch * length, device=final.device)
    now, shared = dict(states), {**shared, "tokens": tokens}
    for block in range(options.max_blocks):
        model.hold_passes((block + 1) * per_block)
        for place in range(per_block):
            each = passes[min(block, options.trained_blocks - 1) * per_block + place]
            result = model.run_pass(block * per_block + place, model.gather(each, now), **shared)
            now[each.target] = result
        output_NH = now["output"].flatten(0, 1)
        if len(index) == batch * length:  # nobody has left
            final = now["output"]
            blocks_N += 1
        else:
            final = final.flatten(0, 1).index_copy(0, index, output_NH).view_as(final)
            blocks_N.index_add_(0, index, torch.ones_like(index))
        if keeps_states:
            kept.append(final)
        if block + 1 == options.max_blocks:
            break
        leaves_N = rule(output_NH, model.read_state(output_NH)).to(index.device) | ~real_N[index]
        stays = (~leaves_N).nonzero().squeeze(1)
        if len(stays) == 0:
            break
        if len(stays) < len(index):
            index = index[stays]
            now = {name: value.flatten(0, 1)[stays].unsqueeze(0) for name, value in now.items()}
            rule.keep(stays)
            tokens.keep(index)
            if rotary is not None:
                shared["position_embeddings"] = tuple(x.flatten(0, 1)[index].unsqueeze(0) for x in rotary)
    _close_cache(cache, tokens, block + 1, options)
    states["output"] = final
    return kept, (blocks_N * real_N).view(batch, length)


def _seen(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def real_and_visible(attention_mask: Tensor | None, like_BS: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Of the new tokens: which are no padding, and how many tokens each sees, itself included; [B, S] each.

    ``attention_mask`` is one of [B, tokens], or [B, 1, S, K] as generate() makes for a static cache (boolean, or added
    to the scores); ``past``: earlier tokens in the cache.
    """
    (batch, length), device = like_BS.shape, like_BS.device
    if attention_mask is None:
        visible = torch.arange(past + 1, past + length + 1, device=device).expand(batch, length)
        return torch.ones_like(visible, dtype=torch.bool), visible
    mask = attention_mask.to(device)
    if mask.ndim == 2:
        return mask[:, -length:].bool(), mask.long().cumsum(-1)[:, -length:]
    sees_BSK = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].expand(batch, -1, -1)
    return sees_BSK.diagonal(past, 1, 2)[:, :length], sees_BSK.sum(-1)


# --- caches ---------------------------------------------------------------------------------------------------------


def _open_cache(cache: Cache | None, config: RecursiveGPTConfig, options: ExitOptions, slots_per_block: int) -> None:
    """Have every earlier token's keys and values in every block that may run."""
    if isinstance(cache, RecursiveCache):
        cache.settle()
    elif cache is not None and len(cache.layers):
        while len(cache.layers) < options.max_blocks * slots_per_block:
            cache.layers.append(copy.deepcopy(cache.layers[-slots_per_block]))


def _close_cache(cache: Cache | None, tokens: TokensOfPass, blocks_run: int, options: ExitOptions) -> None:
    """Give the blocks that nobody reached what the new tokens owe them."""
    if isinstance(cache, RecursiveCache):
        cache.settle()
    elif cache is not None:
        per_block = tokens.slots_per_block
        slots = max(len(cache.layers), options.max_blocks * per_block, options.trained_blocks * per_block)
        for slot in range(blocks_run * per_block, slots):
            cache.update(*tokens.new[slot % per_block], slot)


# --- what it saves --------------------------------------------------------------------------------------------------


class ExitReport:
    """Blocks that tokens took, and FLOPs (a multiply-add counts 2) against the plan's fixed depth.

    Every token that was fed counts, padding does not. FLOPs are those of the layers, of attention over the tokens
    that a token sees, and of each time that a head was asked; a lookup of the embedding costs none.

    Attributes:
        tokens, blocks: of all forwards together; decoded_tokens, decoded_blocks: of those that found earlier tokens in
            a cache.
        histogram: blocks taken -> tokens.
    """

    def __init__(self, config: RecursiveGPTConfig) -> None:
        self.config = config
        self._pending: list[tuple[ExitOptions, Tensor, Tensor, bool, int]] = []
        self._tokens = self._blocks = self._decoded_tokens = self._decoded_blocks = 0
        self._flops = self._fixed_depth_flops = 0.0
        self._histogram: dict[int, int] = {}

    def add(self, options: ExitOptions, blocks_BS: Tensor, visible_BS: Tensor, *, decoded: bool, logits: int) -> None:
        """Take note of a forward; it is counted when the report is read.

        Args:
            blocks_BS: blocks that each token took, 0 for padding. visible_BS: tokens that it saw, itself included.
            decoded: whether earlier tokens lay in a cache. logits: positions of which logits were returned.
        """
        self._pending.append((options, blocks_BS, visible_BS, decoded, logits))

    def _count(self) -> ExitReport:
        pending, self._pending = self._pending, []
        for options, blocks_BS, visible_BS, decoded, logits in pending:
            config, real_BS = self.config, blocks_BS > 0
            tokens, blocks = int(real_BS.sum()), int(blocks_BS.sum())
            self._tokens, self._blocks = self._tokens + tokens, self._blocks + blocks
            if decoded:
                self._decoded_tokens += tokens
                self._decoded_blocks += blocks
            for taken, count in enumerate(blocks_BS.flatten().bincount().tolist()):
                if taken and count:
                    self._histogram[taken] = self._histogram.get(taken, 0) + count
            asked = int(blocks_BS.clamp(max=options.max_blocks - 1).sum())
            head, vocabulary = 2 * config.hidden_size, 2 * config.hidden_size * config.vocab_size
            asking = {"halting": head, "output-change": 0}.get(options.exit, vocabulary)
            per_block_BS, always = _block_flops(config, options, visible_BS.double()), logits * vocabulary
            self._flops += float((per_block_BS * blocks_BS).sum()) + asked * asking + always
            self._fixed_depth_flops += float((per_block_BS * real_BS).sum()) * options.trained_blocks + always
        return self

    @property
    def tokens(self) -> int:
        return self._count()._tokens

    @property
    def blocks(self) -> int:
        return self._count()._blocks

    @property
    def decoded_tokens(self) -> int:
        return self._count()._decoded_tokens

    @property
    def decoded_blocks(self) -> int:
        return self._count()._decoded_blocks

    @property
    def flops(self) -> float:
        return self._count()._flops

    @property
    def fixed_depth_flops(self) -> float:
        return self._count()._fixed_depth_flops

    @property
    def histogram(self) -> dict[int, int]:
        return dict(sorted(self._count()._histogram.items()))

    @property
    def mean_blocks(self) -> float:
        return self.blocks / max(self.tokens, 1)

    @property
    def mean_decoded_blocks(self) -> float:
        """Of tokens that were fed one by one, which is where leaving early saves time."""
        return self.decoded_blocks / max(self.decoded_tokens, 1)

    @property
    def flops_saved(self) -> float:
        """Share of the fixed depth's FLOPs; negative where tokens went beyond it."""
        return 1.0 - self.flops / self.fixed_depth_flops if self.fixed_depth_flops else 0.0

    def to_dict(self) -> dict[str, Any]:
        names = ("tokens", "mean_blocks", "decoded_tokens", "mean_decoded_blocks", "flops", "fixed_depth_flops",
                 "flops_saved", "histogram")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def _block_flops(config: RecursiveGPTConfig, options: ExitOptions, visible_BS: Tensor) -> Tensor:
    """Forward FLOPs of one block, by token."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = 2 * config.hidden_size * (queries + keys)
    matrices += config.hidden_size * config.intermediate_size * (3 if config.mlp_gated else 2)
    layers = config.num_layers * (len(config.plan["passes"]) // options.trained_blocks)
    return layers * (2 * matrices + 4 * queries * visible_BS)
