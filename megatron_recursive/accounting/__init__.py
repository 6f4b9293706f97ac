"""Parameters, FLOPs and memory of a recursive model, computed from its shape and its plan without building it."""

from megatron_recursive.accounting.flops import FlopsPerToken, flops_per_token, inference_flops, mean_flops_per_token
from megatron_recursive.accounting.memory import (
    Recording,
    StageMemory,
    StateBytes,
    cache_bytes_per_token,
    stage_memory,
)
from megatron_recursive.accounting.params import (
    ModelShape,
    ParameterCount,
    count_parameters,
    padded_rows,
    parameters_by_stack,
)

__all__ = [
    "FlopsPerToken", "ModelShape", "ParameterCount", "Recording", "StageMemory", "StateBytes", "cache_bytes_per_token",
    "count_parameters", "flops_per_token", "inference_flops", "mean_flops_per_token", "padded_rows",
    "parameters_by_stack",
    "stage_memory",
]  # fmt: skip
