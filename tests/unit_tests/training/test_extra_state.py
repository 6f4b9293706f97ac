"""Empty ``_extra_state`` entries do not bind a checkpoint to the layer spec that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.unit_tests.training.runs import entries_of


def model() -> Any:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel, RecursiveTransformerConfig
    from megatron_recursive.plan import RecursionConfig

    model_parallel_cuda_manual_seed(1)
    config = RecursiveTransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    return RecursiveGPTModel(
        config=config, transformer_layer_spec=local_block_spec(config), vocab_size=64, max_sequence_length=8,
        recursion=RecursionConfig(num_refinement_blocks=2).resolved(embedding_init_std=0.02),
    )  # fmt: skip


def save_and_load(folder: Path, change: str) -> tuple[list[str], str]:
    """Save a model's sharded state after a change to its extra states, and load it into another model.

    Returns:
        The weights that came back different, and what loading says without ``reading_checkpoint``.
    """
    import io

    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_recursive.models.checkpoint_keys import reading_checkpoint

    parallel_state.initialize_model_parallel()
    first, second = model(), model()
    state = first.sharded_state_dict()
    if change == "without":
        state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    else:
        key = "decoder.layers.self_attention.q_layernorm._extra_state"
        state[key] = ShardedObject(key, io.BytesIO(), (1,), (0,))
    dist_checkpointing.save(state, str(folder))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(7.0)
    with reading_checkpoint():
        wanted = second.sharded_state_dict()
    second.load_state_dict(dist_checkpointing.load(wanted, str(folder)))
    theirs = dict(second.named_parameters())
    different = [name for name, value in first.named_parameters() if not torch.equal(value, theirs[name])]
    try:
        dist_checkpointing.load(second.sharded_state_dict(), str(folder))
    except CheckpointException as error:
        return different, f"{type(error).__name__}: {error}"
    return different, ""


@pytest.mark.parametrize("change", ["without", "with more"])
def test_either_layer_spec_reads_what_the_other_wrote(tmp_path: Path, change: str) -> None:
    ((different, strict),) = run_distributed(save_and_load, 1, tmp_path, change, timeout=120)
    extra = [key for key in entries_of(tmp_path) if "_extra_state" in key]
    assert different == []
    if change == "without":
        assert extra == []
        assert "_extra_state" in strict  # Megatron's own reading insists on them
    else:
        assert any("q_layernorm" in key for key in extra)
