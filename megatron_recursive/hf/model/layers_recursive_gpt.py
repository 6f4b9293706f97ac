"""The layers of recursive GPTs. Ships inside an export: it imports torch, transformers and its neighbours alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .added_parameters import low_rank
from .configuration_recursive_gpt import RecursiveGPTConfig
from .exits_recursive_gpt import ActiveTokens

# --- norms and positions --------------------------------------------------------------------------------------------


class RecursiveGPTNorm(nn.Module):
    """RMSNorm or LayerNorm; ``one_centered`` adds 1 to the stored weight, and ``norm_weights`` may be ones: none."""

    def __init__(self, config: RecursiveGPTConfig, size: int) -> None:
        super().__init__()
        self.shape, self.eps, self.one_centered = (size,), config.norm_eps, config.layernorm_one_centered
        weight = nn.Parameter(torch.zeros(size) if self.one_centered else torch.ones(size))
        self.weight = weight if config.norm_weights == "learned" else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm_type == "layernorm" else None

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight + 1 if self.one_centered and self.weight is not None else self.weight
        if self.bias is None:
            return F.rms_norm(hidden, self.shape, weight, self.eps)
        return F.layer_norm(hidden, self.shape, weight, self.bias, self.eps)


class RecursiveGPTRMSNorm(nn.Module):
    """The plain RMSNorm, under a name and with attributes by which serving engines know it."""

    def __init__(self, config: RecursiveGPTConfig, size: int) -> None:
        super().__init__()
        self.shape, self.variance_epsilon = (size,), config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.shape, self.weight, self.variance_epsilon)


def make_norm(config: RecursiveGPTConfig, size: int) -> nn.Module:
    plain = (config.norm_type, config.layernorm_one_centered, config.norm_weights) == ("rmsnorm", False, "learned")
    return RecursiveGPTRMSNorm(config, size) if plain else RecursiveGPTNorm(config, size)


class RecursiveGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, [B, S, rotary size]."""

    inv_freq: Tensor

    def __init__(self, config: RecursiveGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        default = {"default": self.compute_default_rope_parameters}
        inv_freq, self.attention_scaling = {**ROPE_INIT_FUNCTIONS, **default}[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: RecursiveGPTConfig, **_: Any) -> tuple[Tensor, float]:
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size), 1.0

    @torch.no_grad()
    def forward(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(like.dtype), sin.to(like.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` numbers of each head; heads: [B, heads, S, D]."""
    turned, kept = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


# --- what a pass is given of what it reads, and how a state is moved by what it makes --------------------------------


def make_adapter(size: int) -> nn.Linear:
    """``W [state; input]``; a plain linear layer, since engines and adapters replace and wrap those."""
    return nn.Linear(2 * size, size, bias=False)


class RecursiveGPTInjection(nn.Module):
    """``a * state + delta * B input``; ``delta = softplus(dt_bias)``, and the decay ``a = exp(-delta exp(A_log))``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.B = nn.Parameter(torch.zeros(size, size))

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        delta = F.softplus(self.dt_bias.float())
        decay = torch.exp(-delta * self.A_log.float().exp()).to(state.dtype)
        return decay * state + delta.to(state.dtype) * F.linear(given, self.B)


COMBINING_MODULES = {"concat": make_adapter, "diagonal": RecursiveGPTInjection}


class RecursiveGPTBoundaryGate(nn.Module):
    """``state + a * (result - state)``; ``a = exp(-softplus(up^T down (result - state) + bias) exp(A_log))``."""

    def __init__(self, config: RecursiveGPTConfig) -> None:
        super().__init__()
        size, rank = config.hidden_size, low_rank(config.hidden_size)
        self.A_log, self.bias = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.down, self.up = nn.Parameter(torch.zeros(rank, size)), nn.Parameter(torch.zeros(rank, size))

    def forward(self, result: Tensor, state: Tensor) -> Tensor:
        change = result - state
        delta = F.softplus(F.linear(F.linear(change, self.down), self.up.T, self.bias).float())
        return state + torch.exp(-delta * self.A_log.float().exp()).to(change.dtype) * change


class RecursiveGPTBoundaryNorm(nn.Module):
    """``rms(result) + input``."""

    def __init__(self, config: RecursiveGPTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps

    def forward(self, result: Tensor, given: Tensor) -> Tensor:
        return F.rms_norm(result, result.shape[-1:], eps=self.eps) + given


MOVING_MODULES: dict[str, type[nn.Module]] = {
    "gate": RecursiveGPTBoundaryGate, "norm-inject": RecursiveGPTBoundaryNorm,
}  # fmt: skip

# --- layers ---------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RecursiveGPTPassAttention(nn.Module):
    """Attention of one layer in one pass: no parameters, but a cache layer of its own.

    Engines that keep keys and values themselves (vLLM's Transformers backend) look for modules like this one, which
    call the attention interface and carry ``layer_idx``.
    """

    def __init__(self, config: RecursiveGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout, self.is_causal = config.attention_dropout, True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        past_key_values: Cache | None = None, tokens: ActiveTokens | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Queries, keys and values [B, heads, S, D] to [B, S, heads, D], and the weights if there are any."""
        if tokens is not None:
            query, key, value = tokens.whole_batch(self.layer_idx, query, key, value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if tokens is not None:
            tokens.count(query, key)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        settings = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        if tokens is not None and tokens.rows is not None:
            return tokens.attend_rows(attend, self, query, key, value, attention_mask, settings), None
        result, weights = attend(self, query, key, value, attention_mask, **settings)
        return (result if tokens is None else tokens.active_only(result)), weights


class RecursiveGPTAttention(nn.Module):
    def __init__(self, config: RecursiveGPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.gate_proj = None
        if config.attention_gate:
            self.gate_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_out_bias)
        self.norms_all_heads, self.norms_each_head = config.qk_norm == "full", config.qk_norm == "head"
        if config.qk_norm is not None:
            self.q_norm = make_norm(config, self.head_dim if self.norms_each_head else queries)
            self.k_norm = make_norm(config, self.head_dim if self.norms_each_head else keys)
        self.passes = nn.ModuleList()
        self.ensure_passes(len(config.plan["passes"]))

    def ensure_passes(self, count: int, *, renew: bool = False) -> None:
        """Have attention modules for at least so many passes; ``renew``: with the slots of a plan that changed."""
        if count <= len(self.passes) and not renew:
            return
        for index, first in enumerate(self.config.first_slots(max(count, len(self.passes)))):
            if index == len(self.passes):
                self.passes.append(RecursiveGPTPassAttention(self.config, first + self.layer).train(self.training))
            vars(self.passes[index])["layer_idx"] = first + self.layer

    def forward(
        self, hidden_states: Tensor, pass_index: int = 0,
        position_embeddings: tuple[Tensor, Tensor] | None = None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        if self.norms_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(heads_shape), key.view(heads_shape)
        if self.norms_each_head:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if position_embeddings is not None:
            cos, sin = (each.unsqueeze(1) for each in position_embeddings)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        result, weights = self.passes[pass_index](query, key, value, attention_mask, past_key_values, **kwargs)
        result = result.reshape(*input_shape, -1)
        if self.gate_proj is not None:  # in fp32, as Megatron's
            result = (result * torch.sigmoid(self.gate_proj(hidden_states).float())).to(result.dtype)
        return self.o_proj(result), weights


class RecursiveGPTMLP(nn.Module):
    def __init__(self, config: RecursiveGPTConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RecursiveGPTPassLinear(nn.Linear):
    """``W x + alpha / rank B A x``, with A and B of the pass, where it has some. Its layer says which pass it is."""

    adapter = -1

    def __init__(self, plain: nn.Linear, adapters: dict[str, Any], passes: list[int]) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        rank, self.scale = adapters["rank"], adapters["alpha"] / adapters["rank"]
        for each in passes:  # not in a ParameterDict, which is never called: offloading hooks load what is
            self.register_parameter(f"pass_A_{each}", nn.Parameter(torch.zeros(rank, plain.in_features)))
            self.register_parameter(f"pass_B_{each}", nn.Parameter(torch.zeros(plain.out_features, rank)))

    def forward(self, x: Tensor) -> Tensor:
        result, down = super().forward(x), getattr(self, f"pass_A_{self.adapter}", None)
        if down is None:
            return result
        return result + F.linear(F.linear(x, down) * self.scale, self.get_parameter(f"pass_B_{self.adapter}"))


class RecursiveGPTDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RecursiveGPTConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = RecursiveGPTAttention(config, layer)
        self.mlp = RecursiveGPTMLP(config)
        self.adapted = [] if config.pass_adapters is None else self._adapt(config, layer)
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.norms_the_sum = config.output_norm_scope == "residual"
        self.input_layernorm = make_norm(config, config.hidden_size) if before else None
        self.post_attention_layernorm = make_norm(config, config.hidden_size) if after else None
        self.pre_feedforward_layernorm = make_norm(config, config.hidden_size) if before else None
        self.post_feedforward_layernorm = make_norm(config, config.hidden_size) if after else None

    def _adapt(self, config: RecursiveGPTConfig, layer: int) -> list[RecursiveGPTPassLinear]:
        plan, made, targets = config.recursion_plan, [], config.pass_adapters["targets"]
        stacks = plan.layers_of(config.num_layers)
        passes = [each.index for each in plan.passes if each.grad and layer in stacks[each.stack]]
        for part, others in ((self.self_attn, ("linear_proj", "linear_qkv")), (self.mlp, ("linear_fc2", "linear_fc1"))):
            for name, each in [*part.named_children()]:
                if isinstance(each, nn.Linear) and others[name not in ("o_proj", "down_proj")] in targets:
                    made.append(RecursiveGPTPassLinear(each, config.pass_adapters, passes))
                    setattr(part, name, made[-1])
        return made

    def forward(self, hidden_states: Tensor, adapter: int = -1, **kwargs: Any) -> Tensor:
        for each in self.adapted:  # here, since a checkpointed layer is replayed
            each.adapter = adapter
        residual = hidden_states
        if self.input_layernorm is not None:
            hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        residual = hidden_states = self._add(residual, hidden_states, self.post_attention_layernorm)
        if self.pre_feedforward_layernorm is not None:
            hidden_states = self.pre_feedforward_layernorm(hidden_states)
        return self._add(residual, self.mlp(hidden_states), self.post_feedforward_layernorm)

    def _add(self, residual: Tensor, branch: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return residual + branch
        return norm(residual + branch) if self.norms_the_sum else residual + norm(branch)
