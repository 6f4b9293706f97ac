"""Small random donors of every family, in odd shapes: heads no power of two, a vocabulary that needs padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB, LAYERS, CONTEXT = 251, 4, 64
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
# The context is four times the original one, so that the frequencies below, within and above the blend all count.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0,
        "beta_fast": 4.0, "beta_slow": 0.2, "mscale": 1.5, "mscale_all_dim": 0.5}  # fmt: skip
BASE = {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 100,
    "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
}  # fmt: skip

# Name -> (model type, what differs from BASE).
DONORS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3, head_dim": ("llama", {"head_dim": 14, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama1, biases": ("llama", {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True,
                                 "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "mistral, one key head": ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.25, "truncate": False}}),
    "olmo2": ("olmo2", {"num_key_value_heads": 3}),
}  # fmt: skip


def make_donor(kind: str, **changes: Any) -> Any:
    """A transformers model in evaluation mode, with weights under which every tensor counts."""
    import transformers

    model_type, differing = DONORS[kind]
    config = transformers.CONFIG_MAPPING[model_type](**{**BASE, **differing, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0)
    return model


def save_donor(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    make_donor(kind, **changes).to(dtype).save_pretrained(folder)
    return folder


def tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))
