"""What ``torch.compile`` fuses on CUDA without Transformer Engine, and nothing where it cannot compile.

Activation, bias and dropout are Megatron's own fusions, which its flags choose and ``torch.compile`` makes. Norms are
torch's kernels (``norms.py``), fused as they are. Rotary positions have no flag without Transformer Engine, so that
:func:`choose` replaces a function of Megatron's (0.19):
``megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd`` becomes the same, compiled.
"""

from __future__ import annotations

import functools
import logging
import subprocess

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig

logger = logging.getLogger(__name__)

ROTARY = "_apply_rotary_pos_emb_bshd"
COMPILED_BY_MEGATRON = ("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion")


def choose(config: TransformerConfig) -> None:
    """Fuse what a model of this config can have fused on this machine; call it before the model is built."""
    if not compiles():
        if config.bias_activation_fusion and config.activation_func is F.gelu:  # fused, it is another: GELU by tanh
            config.activation_func = functools.partial(F.gelu, approximate="tanh")
        for flag in COMPILED_BY_MEGATRON:
            setattr(config, flag, False)
    elif not config.apply_rope_fusion and not hasattr(rope_utils, f"{ROTARY}_eager"):
        eager = getattr(rope_utils, ROTARY)
        setattr(rope_utils, f"{ROTARY}_eager", eager)
        setattr(rope_utils, ROTARY, torch.compile(eager))


@functools.cache
def compiles() -> bool:
    """Whether ``torch.compile`` makes a kernel here: its compiler needs another one, of C, at run time."""
    try:
        torch.compile(lambda x: x * torch.sigmoid(x))(torch.ones(8, device="cuda"))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("torch.compile does not work here, so that nothing is fused by it: %s", reason)
        return False
    return True
