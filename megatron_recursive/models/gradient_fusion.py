"""Weight gradients that a layer's kernel adds to ``main_grad`` itself (``gradient_accumulation_fusion``), by layer.

Megatron has one switch. Transformer Engine's linears have a kernel of their own. Those of Megatron-Core want Apex's
and refuse to be built without it; the output layer is one of them beside Transformer Engine's layers too. So the former
fuse where the switch is on, the latter where Apex is there as well, and DDP adds up what is not fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch.nn import Module

APEX_KERNEL = "fused_weight_gradient_mlp_cuda"


@contextmanager
def built_by_layer(config: Any, model: Module) -> Iterator[None]:
    """Build ``model`` inside. Its linears are Megatron's own, or have Transformer Engine's ``fuse_wgrad_accumulation``,
    which each forward reads."""
    wanted = config.gradient_accumulation_fusion
    config.gradient_accumulation_fusion = wanted and find_spec(APEX_KERNEL) is not None
    try:
        yield
    finally:
        config.gradient_accumulation_fusion = wanted
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = wanted
