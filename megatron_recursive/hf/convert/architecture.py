"""What a model is made of, in one record between Megatron's arguments and Hugging Face's configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_recursive.accounting import ModelShape
from megatron_recursive.errors import UserError
from megatron_recursive.models.stored_arguments import DONOR
from megatron_recursive.plan.added_parameters import low_rank

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu2")


@dataclass(frozen=True)
class Yarn:
    """YaRN's scaling of rotary frequencies, in the numbers that Megatron takes.

    Attributes:
        original_positions: the context before the extension by ``factor``.
        beta_fast, beta_slow: turns within that context above which a frequency is kept, below which it is divided.
        mscale, mscale_all_dim: cosines and sines are multiplied by :attr:`attention_factor`, which they make.
        truncate: the bounds of the frequencies that it blends are rounded outwards.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        log = 0.1 * math.log(max(self.factor, 1.0))
        return (self.mscale * log + 1.0) / (self.mscale_all_dim * log + 1.0)

    def to_megatron(self) -> dict[str, Any]:
        return {
            "rotary_scaling_factor": self.factor, "yarn_original_max_position_embeddings": self.original_positions,
            "yarn_beta_fast": self.beta_fast, "yarn_beta_slow": self.beta_slow, "mscale": self.mscale,
            "mscale_all_dim": self.mscale_all_dim, "yarn_correction_range_round_to_int": self.truncate,
        }  # fmt: skip

    @classmethod
    def from_megatron(cls, args: Mapping[str, Any]) -> Yarn:
        """Of a checkpoint's arguments; what is not set is as where Megatron builds its model."""
        given = {name: args.get(name) for name in cls(1.0, 4096).to_megatron()}
        defaults = cls(1.0, 4096).to_megatron()
        return cls(*(defaults[name] if value is None else value for name, value in given.items()))


@dataclass(frozen=True)
class Architecture:
    """The shape of a dense decoder, without its recursion.

    Attributes:
        head_dim: width of one head, which need not be hidden_size / num_attention_heads.
        norm_weights: ``learned``, or ``ones``, of norms that have none.
        norm_one_centered: the stored norm weight is the factor minus 1 (Megatron's --apply-layernorm-1p).
        activation: one of ACTIVATIONS; gated: the MLP multiplies activation(gate) with up.
        attention_gate: attention's result is multiplied with sigmoid(gate) before its output projection.
        qkv_bias, linear_bias: biases of the q, k and v (and gate) projections; of every linear layer.
        qk_norm: None, ``head`` (Qwen3: over each head) or ``full`` (OLMo-2: over the whole projection).
        norm_placement: ``pre``, ``post`` or ``sandwich``.
        output_norm_scope: an output norm is taken of the ``branch``, or of its sum with the ``residual`` stream.
        positions: ``rope``, ``learned`` or ``none``.
        llama3_factor: factor of Llama 3's frequency scaling; None without it.
        linear_factor: factor of linear position interpolation; None without it. yarn: None without it.
        donor: the model type of the Hugging Face model that it came from, which an export takes where it can.
        vocab_size: rows that mean something; padded_vocab_size: rows that Megatron's embedding has.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_one_centered: bool = False
    norm_weights: str = "learned"
    attention_gate: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: str | None = None
    norm_placement: str = "pre"
    output_norm_scope: str = "branch"
    positions: str = "rope"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    llama3_factor: float | None = None
    linear_factor: int | None = None
    yarn: Yarn | None = None
    tied: bool = False
    init_std: float = 0.02
    donor: str | None = None

    def dimension(self, symbol: str) -> int:
        """A symbol of the mapping tables' shapes to its size."""
        sizes = {
            "h": self.hidden_size, "f": self.ffn_hidden_size, "v": self.vocab_size, "d": self.head_dim,
            "q": self.num_attention_heads * self.head_dim, "k": self.num_query_groups * self.head_dim,
            "p": self.max_positions, "1": 1, "2h": 2 * self.hidden_size, "u": 2 * self.ffn_hidden_size,
            "g": 2 * (self.num_attention_heads + self.num_query_groups) * self.head_dim,
            "r": low_rank(self.hidden_size),
        }  # fmt: skip
        return sizes[symbol]

    @property
    def position_embedding_type(self) -> str:
        """Megatron's word for the positions."""
        return "yarn" if self.yarn else {"learned": "learned_absolute"}.get(self.positions, self.positions)

    def shape(self, seq_length: int, rows: int | None = None) -> ModelShape:
        """For accounting, as Megatron holds it; of a Hugging Face model ``rows`` of the embedding are told."""
        return ModelShape(
            self.num_layers, self.hidden_size, self.ffn_hidden_size, self.num_attention_heads, self.num_query_groups,
            self.head_dim, rows or self.padded_vocab_size, seq_length,
            learned_positions=self.max_positions if self.positions == "learned" else 0, gated_linear_unit=self.gated,
            tied_embeddings=self.tied, linear_bias=self.linear_bias, qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm is not None, qk_norm_full=self.qk_norm == "full", norm_bias=self.norm == "layernorm",
            norms_per_layer=4 if self.norm_placement == "sandwich" else 2, attention_gate=self.attention_gate,
            norm_weight=rows is None or self.norm_weights == "learned",
        )  # fmt: skip

    # -- Megatron ------------------------------------------------------------------------------------------------

    def to_megatron(self) -> dict[str, Any]:
        """Megatron's arguments, by the names under which a checkpoint stores them."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "normalization": "RMSNorm" if self.norm == "rmsnorm" else "LayerNorm",
            "layernorm_epsilon": self.norm_eps,
            "layernorm_zero_centered_gamma": self.norm_one_centered,
            "norm_weights": self.norm_weights,
            "attention_output_gate": self.attention_gate,
            "swiglu": self.gated,
            "squared_relu": self.activation == "relu2",
            "bias_gelu_fusion": self.activation == "gelu_pytorch_tanh",  # Megatron's one by tanh
            "add_bias_linear": self.linear_bias,
            "add_qkv_bias": self.qkv_bias and not self.linear_bias,
            "qk_layernorm": self.qk_norm is not None,
            "qk_norm_scope": self.qk_norm or "head",
            "norm_placement": self.norm_placement,
            "output_norm_scope": self.output_norm_scope,
            "position_embedding_type": self.position_embedding_type,
            "add_position_embedding": True,
            "rotary_base": self.rotary_base,
            "rotary_percent": self.rotary_percent,
            "use_rope_scaling": self.llama3_factor is not None,
            "rope_scaling_factor": self.llama3_factor or 8.0,
            "rotary_seq_len_interpolation_factor": self.linear_factor,
            **({} if self.yarn is None else self.yarn.to_megatron()),
            "untie_embeddings_and_output_weights": not self.tied,
            "vocab_size": self.vocab_size,
            "padded_vocab_size": self.padded_vocab_size,
            "init_method_std": self.init_std,
            DONOR: self.donor,
        }

    def megatron_flags(self) -> list[str]:
        """The same as flags, one a string; what is Megatron's default is left out where its flag is a switch."""
        args = self.to_megatron()
        valued = (
            ("num-layers", "num_layers"), ("hidden-size", "hidden_size"), ("ffn-hidden-size", "ffn_hidden_size"),
            ("num-attention-heads", "num_attention_heads"), ("kv-channels", "kv_channels"),
            ("max-position-embeddings", "max_position_embeddings"), ("normalization", "normalization"),
            ("norm-epsilon", "layernorm_epsilon"), ("position-embedding-type", "position_embedding_type"),
            ("vocab-size", "vocab_size"), ("padded-vocab-size", "padded_vocab_size"),
            ("init-method-std", "init_method_std"),
        )  # fmt: skip
        switches = (
            ("swiglu", self.gated), ("squared-relu", args["squared_relu"]),
            ("disable-bias-linear", not self.linear_bias), ("add-qkv-bias", args["add_qkv_bias"]),
            ("no-bias-gelu-fusion", self.activation in ("gelu", "relu2")),
            ("apply-layernorm-1p", self.norm_one_centered),
            ("group-query-attention", args["group_query_attention"]), ("attention-output-gate", self.attention_gate),
            ("qk-layernorm", args["qk_layernorm"]),
            ("untie-embeddings-and-output-weights", not self.tied), ("use-rope-scaling", args["use_rope_scaling"]),
        )  # fmt: skip
        flags = [f"--{flag}={args[name]}" for flag, name in valued]
        flags += [f"--{flag}" for flag, on in switches if on]
        if args["group_query_attention"]:
            flags.append(f"--num-query-groups={self.num_query_groups}")
        if self.qk_norm == "full":
            flags.append("--qk-norm-scope=full")
        if self.norm_weights != "learned":
            flags.append(f"--norm-weights={self.norm_weights}")
        if self.norm_placement != "pre":
            flags += [f"--norm-placement={self.norm_placement}", f"--output-norm-scope={self.output_norm_scope}"]
        if self.positions == "rope":
            flags += [f"--rotary-base={self.rotary_base}", f"--rotary-percent={self.rotary_percent}"]
            if self.llama3_factor is not None:
                flags.append(f"--rope-scaling-factor={self.llama3_factor}")
            if self.linear_factor is not None:
                flags.append(f"--rotary-seq-len-interpolation-factor={self.linear_factor}")
            if self.yarn is not None:
                flags += [f"--{name.replace('_', '-')}={value}" for name, value in self.yarn.to_megatron().items()
                          if type(value) is not bool]  # fmt: skip
                flags += [] if self.yarn.truncate else ["--no-yarn-correction-range-round-to-int"]
        return flags

    @classmethod
    def from_megatron(cls, args: Mapping[str, Any], where: str) -> Architecture:
        """What a checkpoint's arguments describe.

        Raises:
            UserError: they ask for something that has no counterpart here.
        """
        for name, harmless in _WITHOUT_COUNTERPART:
            if args.get(name) not in (None, False, 0, harmless):
                raise UserError(f"{where} has {name} = {args[name]}, which has no Hugging Face counterpart here.")
        heads, linear_bias, gated = args["num_attention_heads"], args.get("add_bias_linear", True), args.get("swiglu")
        tanh = args.get("bias_gelu_fusion") and linear_bias  # --openai-gelu is read by nobody
        plain = "relu2" if args.get("squared_relu") else "gelu_pytorch_tanh" if tanh else "gelu"
        positions = args.get("position_embedding_type", "learned_absolute")
        if positions not in ("rope", "learned_absolute", "none", "yarn"):
            raise UserError(f"{where} has --position-embedding-type {positions}, which has no counterpart here.")
        yarn, factor = positions == "yarn", args.get("rotary_seq_len_interpolation_factor")
        return cls(
            num_layers=args["num_layers"],
            hidden_size=args["hidden_size"],
            ffn_hidden_size=args["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=args["num_query_groups"] if args.get("group_query_attention") else heads,
            head_dim=args.get("kv_channels") or args["hidden_size"] // heads,
            vocab_size=args.get("vocab_size") or args["padded_vocab_size"],
            padded_vocab_size=args["padded_vocab_size"],
            max_positions=args["max_position_embeddings"],
            norm="rmsnorm" if args.get("normalization") == "RMSNorm" else "layernorm",
            norm_eps=args.get("layernorm_epsilon", 1e-5),
            norm_one_centered=bool(args.get("layernorm_zero_centered_gamma")),
            norm_weights=args.get("norm_weights") or "learned",
            attention_gate=bool(args.get("attention_output_gate")),
            activation="silu" if gated else plain,
            gated=bool(gated),
            qkv_bias=bool(linear_bias or args.get("add_qkv_bias")),
            linear_bias=bool(linear_bias),
            qk_norm=args.get("qk_norm_scope", "head") if args.get("qk_layernorm") else None,
            norm_placement=args.get("norm_placement") or "pre",
            output_norm_scope=args.get("output_norm_scope") or "branch",
            positions={"learned_absolute": "learned", "yarn": "rope"}.get(positions, positions),
            rotary_base=args.get("rotary_base", 10000),
            # Megatron's YaRN reads neither of the other scalings, nor the percentage.
            rotary_percent=1.0 if yarn else args.get("rotary_percent", 1.0),
            llama3_factor=args.get("rope_scaling_factor", 8.0) if args.get("use_rope_scaling") and not yarn else None,
            linear_factor=None if yarn else factor,
            yarn=Yarn.from_megatron(args) if yarn else None,
            tied=not args.get("untie_embeddings_and_output_weights"),
            init_std=args.get("init_method_std", 0.02),
            donor=args.get(DONOR),
        )


# An argument of Megatron, and the value (besides None, False and 0) under which it changes nothing.
_WITHOUT_COUNTERPART: tuple[tuple[str, Any], ...] = (
    ("num_experts", None), ("mtp_num_layers", None), ("multi_latent_attention", None), ("window_size", None),
    ("quick_geglu", None), ("qk_l2_norm", None), ("rotary_interleaved", None), ("softmax_type", "vanilla"),
    ("apply_residual_connection_post_layernorm", None), ("hybrid_layer_pattern", None), ("qk_clip", None),
    ("heterogeneous_layers_config_path", None), ("no_rope_freq", None), ("use_mup", None),
    ("experimental_attention_variant", None), ("glu_linear_offset", None), ("activation_func_clamp_value", None),
)  # fmt: skip
