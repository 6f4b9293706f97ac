"""Leaving the recursion early at inference: when a token leaves, what later tokens see of it, what it saves.

Ships inside an export: it imports torch and transformers alone.

**The policy for skipped passes.** A token that leaves after block b keeps its states, and for every pass of every later
block it provides the keys and values that it computed in block b in the same cache layer of the block (same layer, same
pass counted from the block's start). This depends on the token and on earlier ones alone, so a prompt read at once,
tokens decoded one by one and a forward without a cache agree. Later tokens attend to it in deeper blocks as usual.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_recursive_gpt import RecursiveCache, check_filled

if TYPE_CHECKING:
    from .configuration_recursive_gpt import RecursiveGPTConfig

logger = logging.get_logger(__name__)

EXITS = ("halting", "quantile", "output-change", "kl", "argmax")
THRESHOLDS = ("halt_threshold", "exit_threshold", "exit_stable_blocks")  # an exit reads one: threshold_of
EXIT_ARGUMENTS = ("exit", *THRESHOLDS, "max_inference_refinement_steps")
GENERATION_ENTRIES = (*EXIT_ARGUMENTS, "num_refinement_blocks")  # what a generation config may hold besides
LEAVE_BELOW = ("output-change", "kl")  # their threshold; the others leave at it and above
_THRESHOLDS = {"quantile": 0.5, "output-change": 0.03, "kl": 1e-3}
_DEFAULT_CAP = 12  # of --max-inference-refinement-steps; nobody asked for it


def threshold_of(exit: str) -> str:
    """The argument that an exit compares with."""
    return {"halting": "halt_threshold", "argmax": "exit_stable_blocks"}.get(exit, "exit_threshold")


def asking_flops(exit: str, hidden_size: int, vocab_size: int) -> int:
    """What an exit costs whenever it asks a token: its halting head or gate, all its logits, or no head."""
    return 2 * hidden_size * {"halting": 1, "quantile": 1, "output-change": 0}.get(exit, vocab_size)


@dataclass(frozen=True)
class ExitOptions:
    """When a token leaves. It is asked after each block, and leaves at the latest after ``max_blocks``.

    Attributes:
        exit: ``halting``: its halting probability is at least ``halt_threshold``. ``quantile``: by its exit gate, the
            probability of having left is at least ``exit_threshold``. The others need no training, and compare with the
            block before: ``output-change``: its output state changed by less than ``exit_threshold``
            (relative L2); ``kl``: KL(this block's next-token distribution || the one before) is below it (nats);
            ``argmax``: the last ``exit_stable_blocks`` blocks have the same most likely token.
        max_blocks: from ``max_inference_refinement_steps``. Not given, it is the config's, which a depth that is asked
            for sets too, but at most the T blocks of the plan, and those where it has the default; given, it may exceed
            T, and the last block's passes are then repeated.
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
        kinds = [(p.block, p.target, p.reads, p.stack) for p in plan.passes]
        blocks = [[kind for number, *kind in kinds if number == block] for block in range(plan.num_blocks)]
        in_parts = any(p.target == "input" or p.stack == "coda" for p in plan.passes)
        if plan.is_plain or in_parts or any(block != blocks[0] for block in blocks):
            raise ValueError(f"exit={exit} needs a plan of refinement blocks that are alike, which this model has not.")
        if exit == "halting" and not plan.has_halting:
            raise ValueError("exit=halting needs a halting head, which this model was trained without.")
        if exit == "quantile" and not plan.exit_gate:
            raise ValueError("exit=quantile needs an exit gate, which this model was trained without.")
        own = threshold_of(exit)
        for name, value in zip(THRESHOLDS, (halt_threshold, exit_threshold, exit_stable_blocks), strict=True):
            if value is not None and name != own:
                raise ValueError(f"exit={exit} does not read {name}; give {own}, or leave it out.")
        knobs, trained = config.recursion, len(blocks)
        threshold = knobs.get("halt_threshold", 0.5) if halt_threshold is None else halt_threshold
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"halt_threshold must lie strictly between 0 and 1, but is {threshold}.")
        change = _THRESHOLDS.get(exit, 0.0) if exit_threshold is None else exit_threshold
        if exit == "quantile" and not 0 < change <= 1:
            raise ValueError(f"exit_threshold of exit=quantile must lie above 0 and be at most 1, but is {change}.")
        stable = 2 if exit_stable_blocks is None else exit_stable_blocks
        cap = max_inference_refinement_steps
        if cap is None:
            cap = min(trained, knobs.get("max_inference_refinement_steps", trained))
            cap = trained if cap == _DEFAULT_CAP else cap
        for name, value, least in (("exit_threshold", change, 0), ("exit_stable_blocks", stable, 2),
                                   ("max_inference_refinement_steps", cap, 1)):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}.")
        if cap > trained:
            logger.warning_once(
                f"max_inference_refinement_steps {cap} is beyond the {trained} blocks that the model was trained with."
            )
        return cls(exit, threshold, change, stable, cap, trained)


@dataclass
class Work:
    """What one forward computed, summed over its passes and layers.

    Attributes:
        tokens: through a layer each. scores: of attention, a query and a key each. asked: tokens of which the rule
            asked a head. logits: positions of which logits were returned.
        fixed_depth: tokens and scores of one pass through one layer where nobody has left.
        adapted: of the tokens, those in passes with gradient, which alone may have adapters.
    """

    tokens: int = 0
    scores: int = 0
    asked: int = 0
    logits: int = 0
    fixed_depth: tuple[int, int] = (0, 0)
    adapted: int = 0

    def add(self, tokens: int, scores: int, adapted: int = 0) -> None:
        self.tokens, self.scores, self.adapted = self.tokens + tokens, self.scores + scores, self.adapted + adapted
        self.fixed_depth = self.fixed_depth if any(self.fixed_depth) else (tokens, scores)


class ExitRule:
    """Asks the active tokens, those that have not left, after each block; for one forward.

    ``work``: what the forward computed.
    """

    def __init__(
        self, options: ExitOptions, halting_logits: Callable[[Tensor], Tensor], logits_of: Callable[[Tensor], Tensor],
        work: Work | None = None,
    ) -> None:  # fmt: skip
        self.options, self.halting_logits, self.logits_of = options, halting_logits, logits_of
        self.work = Work() if work is None else work
        self.before: Tensor | None = None  # [N, ...]: what the block before gave, for the active tokens
        self.stable_N: Tensor | None = None  # how many blocks in a row had the same arg-max

    def __call__(self, state_NH: Tensor, read_NH: Tensor) -> Tensor:
        """Which of the tokens leave, [N], given their output state (as the passes and as the heads see it)."""
        threshold, signal_N = getattr(self.options, threshold_of(self.options.exit)), self.signal(state_NH, read_NH)
        return signal_N < threshold if self.options.exit in LEAVE_BELOW else signal_N >= threshold

    def signal(self, state_NH: Tensor, read_NH: Tensor) -> Tensor:
        """What is compared with the threshold, [N]; infinity where a change is asked of the first block."""
        kind, before = self.options.exit, self.before
        self.work.asked += len(state_NH)
        if kind == "halting":
            return torch.sigmoid(self.halting_logits(read_NH))
        if kind == "quantile":
            stays_N = torch.sigmoid(-self.halting_logits(read_NH).float())
            self.before = stays_N if before is None else before * stays_N
            return (1 - self.before).clamp(max=1 - 2.0**-24)  # below 1, at which nobody leaves
        if kind == "output-change":
            self.before = now = state_NH.float()
            if before is None:
                return torch.full_like(now[:, 0], torch.inf)
            return (now - before).norm(dim=-1) / now.norm(dim=-1)
        logits_NV = self.logits_of(state_NH).float()
        if kind == "kl":
            self.before = log_p = F.log_softmax(logits_NV, dim=-1)
            if before is None:
                return torch.full_like(log_p[:, 0], torch.inf)
            return (log_p.exp() * (log_p - before)).sum(-1)
        self.before = choice_N = logits_NV.argmax(-1)
        if before is None or self.stable_N is None:
            self.stable_N = torch.ones_like(choice_N)
        else:
            self.stable_N = torch.where(choice_N == before, self.stable_N + 1, 1)
        return self.stable_N

    def select(self, index: Tensor) -> None:
        """Go on with these of the tokens."""
        self.before = None if self.before is None else self.before[index]
        self.stable_N = None if self.stable_N is None else self.stable_N[index]


def left_by(gate_logits: Tensor, blocks: int) -> Tensor:
    """The probability of having left, by an exit gate, after each of the blocks that ran; all leave after the last."""
    stays = torch.sigmoid(-gate_logits.float()).cumprod(0)
    if len(stays) == blocks:
        stays[-1] = 0
    return 1 - stays


class ActiveTokens:
    """The tokens that a pass computes, and how they meet the keys and values of those that have left.

    Hidden states have the N active tokens as [1, N, H] (all of them as [B, S, H] while nobody has left).
    Attention alone sees the whole batch: keys and values of those that have left come from the block before.
    """

    def __init__(self, shape: tuple[int, int], layers_per_block: int, work: Work) -> None:
        self.shape, self.layers_per_block, self.work = shape, layers_per_block, work
        self.adapted = False  # whether the pass has gradient in training
        self.index: Tensor | None = None  # [N] of B * S; None: all
        self.rows: list[slice] | None = None  # runs of active sequences, where each has one token
        self.block_kv: dict[int, tuple[Tensor, Tensor]] = {}  # cache layer of a block -> keys, values [B, heads, S, D]

    def select(self, index: Tensor) -> None:
        """Go on with these of the tokens, [N] of B * S."""
        self.index = index
        if self.shape[1] == 1:
            self.rows, rows = [], index.tolist()
            for row in rows:
                if self.rows and self.rows[-1].stop == row:
                    self.rows[-1] = slice(self.rows[-1].start, row + 1)
                else:
                    self.rows.append(slice(row, row + 1))

    def whole_batch(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the active tokens, as attention needs them; keys and values are remembered."""
        layer = layer_idx % self.layers_per_block
        if self.index is not None and self.rows is not None:  # [1, heads, N, D] -> [N, heads, 1, D]
            query, key, value = (each.transpose(0, 2) for each in (query, key, value))
            old_key, old_value = self.block_kv[layer]
            index = self.index.to(key.device)
            key, value = old_key.index_copy(0, index, key), old_value.index_copy(0, index, value)
        elif self.index is not None:
            old_key, old_value = self.block_kv[layer]
            zeros = query.new_zeros(self.shape[0], query.shape[1], self.shape[1], query.shape[3])
            query, key, value = (
                self._scatter(old, new) for old, new in ((zeros, query), (old_key, key), (old_value, value))
            )
        self.block_kv[layer] = key, value
        return query, key, value

    def _scatter(self, old: Tensor, new: Tensor) -> Tensor:
        """``old`` [B, heads, S, D] with ``new`` [1, heads, N, D] at the active tokens."""
        assert self.index is not None
        whole = old.transpose(1, 2).flatten(0, 1).index_copy(0, self.index.to(old.device), new[0].transpose(0, 1))
        return whole.unflatten(0, self.shape).transpose(1, 2)

    def active_only(self, result: Tensor) -> Tensor:
        """Of attention's [B, S, heads, D], the active tokens, [1, N, heads, D]."""
        return result if self.index is None else result.flatten(0, 1)[self.index.to(result.device)].unsqueeze(0)

    def count(self, query: Tensor, key: Tensor) -> None:
        """Take note of a call of attention, [B, heads, S, D] each."""
        tokens = math.prod(self.shape) if self.index is None else len(self.index)
        self.work.add(tokens, query.shape[0] * query.shape[2] * key.shape[2], tokens * self.adapted)

    def attend_rows(
        self, attend: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, settings: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Attention of the active sequences, on views of the cache: nothing is copied for the others."""
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
    model: Any, states: dict[str, Tensor], attention_mask: Tensor | None, rule: ExitRule, output_block_states: bool,
    shared: dict[str, Any],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Run blocks until every token has left. ``states["output"]`` becomes the state that each token left with.

    Args:
        model: the base model. states: [B, S, H] each. shared: what every layer is given.

    Returns:
        The output states after each block that ran (if they are asked for), and [B, S] blocks run (0: padding).
    """
    outputs = ("output_attentions", "output_hidden_states")
    if any(shared.get(name, getattr(model.config, name, False)) for name in outputs):
        raise ValueError("output_attentions and output_hidden_states need all blocks; they do not go with an exit.")
    if not isinstance(shared["attention_mask"], Tensor | None):
        raise ValueError("An exit does not work with flex_attention; use sdpa or eager.")
    plan, options = model.plan, rule.options
    per_block = plan.passes_per_block
    batch, length = states["input"].shape[:2]
    tokens = ActiveTokens((batch, length), model.config.layers_per_block, rule.work)
    cache, rotary = shared["past_key_values"], shared["position_embeddings"]
    _open_cache(cache, options, tokens.layers_per_block)
    if rotary is not None:
        rotary = tuple(each.expand(batch, -1, -1) for each in rotary)
    final, block_states = states["output"], []
    blocks_N = torch.zeros(batch * length, dtype=torch.long, device=final.device)
    past = 0 if cache is None else int(cache.get_seq_length())
    real_N = real_tokens(attention_mask, blocks_N.view(batch, length), past).flatten()
    index = torch.arange(batch * length, device=final.device)
    now, shared = dict(states), {**shared, "tokens": tokens}
    for block in range(options.max_blocks):
        model.ensure_passes((block + 1) * per_block)
        for number in range(block * per_block, (block + 1) * per_block):
            each = plan.known(number)
            tokens.adapted = each.grad
            result = model.run_pass(number, model.gather(each, now), **shared)
            now[each.target] = model.moved(each, now, result)
        output_NH = now["output"].flatten(0, 1)
        if len(index) == batch * length:  # nobody has left
            final = now["output"]
            blocks_N += 1
        else:
            final = final.flatten(0, 1).index_copy(0, index, output_NH).view_as(final)
            blocks_N.index_add_(0, index, torch.ones_like(index))
        if output_block_states:
            block_states.append(final)
        if block + 1 == options.max_blocks:
            break
        leaves_N = rule(output_NH, model.read_state(output_NH)).to(index.device) | ~real_N[index]
        stays = (~leaves_N).nonzero().squeeze(1)
        if len(stays) == 0:
            break
        if len(stays) < len(index):
            index = index[stays]
            now = {name: value.flatten(0, 1)[stays].unsqueeze(0) for name, value in now.items()}
            rule.select(stays)
            tokens.select(index)
            if rotary is not None:
                shared["position_embeddings"] = tuple(x.flatten(0, 1)[index].unsqueeze(0) for x in rotary)
    _close_cache(cache, tokens, block + 1, options)
    states["output"] = final
    return block_states, (blocks_N * real_N).view(batch, length)


def real_tokens(attention_mask: Tensor | None, like_BS: Tensor, past: int) -> Tensor:
    """Which of the new tokens are no padding, [B, S].

    ``attention_mask`` is one of [B, tokens], or [B, 1, S, K] as generate() makes for a static cache (boolean, or added
    to the scores); ``past``: earlier tokens in the cache.
    """
    (batch, length), device = like_BS.shape, like_BS.device
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    mask = attention_mask.to(device)
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    sees_BSK = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].expand(batch, -1, -1)
    return sees_BSK.diagonal(past, 1, 2)[:, :length]


# --- caches ---------------------------------------------------------------------------------------------------------


def _open_cache(cache: Cache | None, options: ExitOptions, layers_per_block: int) -> None:
    """Have every earlier token's keys and values in every block that may run; a RecursiveCache does that by itself."""
    if cache is not None and not isinstance(cache, RecursiveCache) and len(cache.layers):
        check_filled(cache, min(len(cache.layers), options.max_blocks * layers_per_block))
        while len(cache.layers) < options.max_blocks * layers_per_block:
            cache.layers.append(copy.deepcopy(cache.layers[-layers_per_block]))


def _close_cache(cache: Cache | None, tokens: ActiveTokens, blocks_run: int, options: ExitOptions) -> None:
    """Give the blocks that nobody reached the new tokens' keys and values of the last block."""
    if cache is not None and not isinstance(cache, RecursiveCache):
        per_block = tokens.layers_per_block
        layers = max(len(cache.layers), options.max_blocks * per_block, options.trained_blocks * per_block)
        for layer in range(blocks_run * per_block, layers):
            cache.update(*tokens.block_kv[layer % per_block], layer)


# --- what it saves --------------------------------------------------------------------------------------------------


class ExitReport:
    """Blocks that tokens took, and FLOPs (a multiply-add counts 2) against the plan's fixed depth.

    FLOPs are those that ran, prompts and padding included: of the layers, of every score that attention computed (also
    those that a mask hides, as FLOP counters have it), and of each time that a head was asked; a lookup of the
    embedding costs none. The fixed depth's are those of the same forwards at all T blocks.

    Attributes:
        tokens, blocks: of all forwards together, without padding; decoded_tokens, decoded_blocks: of those that found
            earlier tokens in a cache.
        histogram: blocks taken -> tokens.
    """

    def __init__(self, config: RecursiveGPTConfig) -> None:
        self.config = config
        self._pending: list[tuple[ExitOptions, Tensor, Work, bool]] = []
        self._tokens = self._blocks = self._decoded_tokens = self._decoded_blocks = 0
        self._flops = self._fixed_depth_flops = 0.0
        self._histogram: dict[int, int] = {}

    def add(self, options: ExitOptions, blocks_BS: Tensor, work: Work, *, decoded: bool) -> None:
        """Take note of a forward; it is counted when the report is read.

        Args:
            blocks_BS: blocks that each token took, 0 for padding. decoded: whether earlier tokens lay in a cache.
        """
        self._pending.append((options, blocks_BS, work, decoded))

    def _count(self) -> ExitReport:
        pending, self._pending = self._pending, []
        for options, blocks_BS, work, decoded in pending:
            config = self.config
            tokens, blocks = int((blocks_BS > 0).sum()), int(blocks_BS.sum())
            self._tokens, self._blocks = self._tokens + tokens, self._blocks + blocks
            if decoded:
                self._decoded_tokens += tokens
                self._decoded_blocks += blocks
            for taken, count in enumerate(blocks_BS.flatten().bincount().tolist()):
                if taken and count:
                    self._histogram[taken] = self._histogram.get(taken, 0) + count
            asking = asking_flops(options.exit, config.hidden_size, config.vocab_size)
            always, layers = work.logits * 2 * config.hidden_size * config.vocab_size, config.num_hidden_layers
            self._flops += _flops(config, work.tokens, work.scores, work.adapted) + work.asked * asking + always
            (tokens, scores), adapted = work.fixed_depth, sum(config.adapted_layers(options.trained_blocks))
            self._fixed_depth_flops += _flops(config, layers * tokens, layers * scores, adapted * tokens) + always
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


def _flops(config: RecursiveGPTConfig, tokens: int, scores: int, adapted: int) -> float:
    """Forward FLOPs of so many tokens in a layer each, ``adapted`` of them beside the adapters of a pass, with so many
    scores of attention (a query and a key each)."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = {
        "linear_qkv": [(hidden, out) for out in (queries, keys, keys, *[queries] * bool(config.attention_gate))],
        "linear_proj": [(queries, hidden)],
        "linear_fc1": [(hidden, inner)] * (2 if config.mlp_gated else 1),
        "linear_fc2": [(inner, hidden)],
    }
    own, low = sum(size_in * size_out for each in matrices.values() for size_in, size_out in each), 0
    if (adapters := config.pass_adapters) is not None:
        low = adapters["rank"] * sum(sum(shape) for name in adapters["targets"] for shape in matrices[name])
    return float(2 * own * tokens + 2 * low * adapted + 4 * queries * scores)
