"""Configuration of recursive GPTs in transformers. Ships inside an export, beside the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import transformers

from .recursion_plan import RecursionPlan

OLDEST = (5, 18)  # of transformers, for what this file and its neighbours import; transformers loads this file first
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"This model needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, but {transformers.__version__} is installed; "
        "run pip install --upgrade transformers."
    )

_CHOICES = {
    "norm_type": ("rmsnorm", "layernorm"),
    "norm_weights": ("learned", "ones"),
    "qk_norm": (None, "head", "full"),
    "norm_placement": ("pre", "post", "sandwich"),
    "output_norm_scope": ("branch", "residual"),
    "position_embedding": ("rope", "learned", "none"),
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RecursiveGPTConfig(transformers.PreTrainedConfig):
    r"""A GPT whose layers are applied once per pass of a plan.

    Llama's names where Llama has one, and:

    Args:
        num_layers: layers held; 12, where it follows from nothing.
        num_hidden_layers: layers applied, that is ``num_layers`` times the number of passes. Caches and serving engines
            count by it. It follows from ``num_layers``, and is read only where that is not given.
        norm_type: ``rmsnorm`` or ``layernorm``; norm_eps; layernorm_one_centered: the stored weight is added to 1;
            norm_weights: ``learned``, or ``ones``, of norms that have none.
        norm_placement: ``pre``, ``post`` (on what attention and MLP give) or ``sandwich`` (both); output_norm_scope:
            ``branch``, before it is added to the residual stream, or ``residual``, of their sum.
        qk_norm: None, ``head`` (each head's queries and keys) or ``full`` (all heads' together, as OLMo-2).
        attention_gate: attention's result is multiplied with the sigmoid of one more projection, ``gate_proj``.
        attention_bias, attention_out_bias, mlp_bias: biases of q, k, v, gate; of the output projection; of the MLP.
        mlp_gated: ``down(act(gate(x)) * up(x))``, or without a gate ``down(act(up(x)))``.
        position_embedding: ``rope`` (rope_parameters, partial_rotary_factor), ``learned`` or ``none``.
        plan: the passes and what holds for all of them, as written by ``RecursionPlan.to_json``; None is a plain GPT.
        recursion: the knobs beside the plan: halt_loss_weight, halt_target, halt_bias, halt_threshold,
            max_inference_refinement_steps.
        pass_adapters: ``rank``, ``alpha`` and ``targets`` of low-rank adapters that each pass with gradient has of its
            own; None without them.
    """

    model_type = "recursive_gpt"
    # Of the outputs, what the trainer's predictions leave out.
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "halt_loss", "block_logits", "block_halting", "blocks"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    # Any: None when not given, which __post_init__ replaces.
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: Any = None
    num_hidden_layers: Any = None
    num_attention_heads: int = 12
    num_key_value_heads: Any = None
    head_dim: Any = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: float = 0.0
    attention_gate: bool = False
    qk_norm: str | None = None
    norm_type: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_weights: str = "learned"
    norm_placement: str = "pre"
    output_norm_scope: str = "branch"
    layernorm_one_centered: bool = False
    position_embedding: str = "rope"
    rope_parameters: Any = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    plan: Any = None
    recursion: Any = None
    pass_adapters: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.recursion = dict(self.recursion or {})
        self.set_plan(self.plan)
        super().__post_init__(**kwargs)
        self.check()
        self.base_model_tp_plan = self._tensor_parallel_plan()

    # -- the plan ------------------------------------------------------------------------------------------------

    def set_plan(self, plan: RecursionPlan | Mapping[str, Any] | None) -> None:
        """Take another plan, and size caches for it."""
        if not isinstance(plan, RecursionPlan):
            plan = RecursionPlan.plain() if plan is None else RecursionPlan.from_dict(plan)
        self.plan = json.loads(plan.to_json())
        if self.num_layers is None:
            applied = 12 * plan.num_passes if self.num_hidden_layers is None else self.num_hidden_layers
            self.num_layers, rest = divmod(applied, plan.num_passes)
            if rest or len(plan.stacks) > 1:
                raise ValueError(
                    f"num_hidden_layers ({applied}) counts layers times passes and must be a multiple of the plan's "
                    f"{plan.num_passes} passes; give num_layers, the layers held."
                )
        self.num_hidden_layers = plan.unrolled_layers(self.num_layers)

    @property
    def recursion_plan(self) -> RecursionPlan:
        """The plan, read anew each time: what a config holds is what its file will."""
        return RecursionPlan.from_dict(self.plan)

    @property
    def layers_per_block(self) -> int:
        """Layers that a block goes through, of blocks that are alike."""
        return self.num_hidden_layers // self.recursion_plan.num_blocks

    def adapted_layers(self, blocks: int) -> list[int]:
        """Layers that the passes with gradient, which alone may have adapters, go through, for each of the blocks."""
        plan = self.recursion_plan
        stacks, size = plan.layers_of(self.num_layers), plan.passes_per_block
        layers = [len(stacks[p.stack]) if p.grad else 0 for p in map(plan.known, range(blocks * size))]
        return [sum(layers[start : start + size]) for start in range(0, len(layers), size)]

    def first_slots(self, count: int) -> list[int]:
        """Where layer 0 would stand in a cache, for each pass of the plan, and of ``count`` where that is more."""
        plan = self.recursion_plan
        stacks = plan.layers_of(self.num_layers)
        layers = [stacks[plan.known(index).stack] for index in range(max(count, plan.num_passes))]
        starts = accumulate(map(len, layers), initial=0)
        return [start - held.start for start, held in zip(starts, layers, strict=False)]

    @property
    def num_refinement_blocks(self) -> int:
        return self.recursion_plan.num_blocks

    @num_refinement_blocks.setter
    def num_refinement_blocks(self, count: int) -> None:
        raise ValueError(
            "num_refinement_blocks follows from the plan; load the model and call "
            f"model.set_num_refinement_blocks({count})."
        )

    @property
    def has_halting(self) -> bool:
        return self.recursion_plan.has_halting

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what no model can be built from; each model asks again, since configs are changed by assignment."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = ", ".join(str(choice) for choice in choices)
                raise ValueError(f"{name} must be one of {allowed}, but is {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        if getattr(self, "sliding_window", None) is not None:
            raise ValueError("RecursiveGPT attends to all earlier tokens; sliding_window must be None.")
        if self.norm_placement == "pre" and self.output_norm_scope == "residual":
            raise ValueError("output_norm_scope residual needs norm_placement post or sandwich.")
        rope = (self.rope_parameters or {}).get("rope_type", "default")
        if self.position_embedding == "rope" and rope not in _ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(_ROPE_TYPES)}, but is {rope}.")

    def _tensor_parallel_plan(self) -> dict[str, str]:
        attention = "layers.*.self_attn."
        plan = dict(type(self).base_model_tp_plan)
        if not self.mlp_gated:
            del plan["layers.*.mlp.gate_proj"]
        gate = ["gate"] * self.attention_gate
        plan.update({f"{attention}{x}_proj": "colwise" for x in gate})
        if self.qk_norm == "head":
            plan.update({f"{attention}{x}_norm": "replicated_with_grad_allreduce" for x in "qk"})
        elif self.qk_norm == "full":  # the norm runs over all heads: they are gathered before it, and split after
            plan.update({f"{attention}{x}_proj": "colwise_gather_output" for x in ["q", "k", "v", *gate]})
            plan[f"{attention}o_proj"] = "rowwise_split_input"
        return plan


__all__ = ["RecursiveGPTConfig"]
