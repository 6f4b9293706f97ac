"""What checkpoints store beside tensors: arguments' changed names, and one of our own. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace

TRACKER = "latest_checkpointed_iteration.txt"  # says in which folder the newest one is
DONOR = "donor_model_type"
"""Of the Hugging Face model that the weights came from, where it is known; runs hand it on."""
NO_VALUE_BIAS = ("huginn_raven",)
"""Donors with biases on q and k alone. Megatron's is one of q, k and v, of which v's part then stays at zero."""

# By the names of before Megatron 0.16 (the last one: 0.17), and of today.
_RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma",
            "hybrid_override_pattern": "hybrid_layer_pattern"}  # fmt: skip


def name_as_today(args: Namespace) -> None:
    """Give the arguments that an earlier Megatron stored today's names too; what has them already keeps its values.

    Earlier versions of this package imported GELU by tanh as ``--openai-gelu``, which nothing in Megatron 0.19 reads:
    it is the fused one.
    """
    if hasattr(args, DONOR) and getattr(args, "openai_gelu", False) and getattr(args, "add_bias_linear", True):
        args.bias_gelu_fusion = True
    for before, now in _RENAMED.items():
        if hasattr(args, before) and not hasattr(args, now):
            setattr(args, now, getattr(args, before))
