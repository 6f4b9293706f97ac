"""GGUF files are read tensor by tensor, to the values that transformers gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.gguf_file import with_split
from megatron_recursive.hf.convert.sources import open_source
from tests.unit_tests.hf.donors import make_donor

gguf = pytest.importorskip("gguf")

SHAPE = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6, "num_key_value_heads": 2}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _pairs(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of a Llama's queries and keys."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_gguf(kind: str, path: Path, scaling: str | None = None, **changes: Any) -> Any:
    """A donor as llama.cpp stores it, matrices at 8 bits; the donor."""
    model = make_donor(kind, **SHAPE, **changes)
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", 16))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    writer.add_vocab_size(config.vocab_size)
    kinds = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2]) if arch == "llama" else None
        data = (_pairs(tensor, heads) if heads else tensor).numpy()
        kept = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        quantised = gguf.quantize(data, kept)
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), quantised, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama3, head_dim", {"head_dim": 16, "rope_parameters": PLAIN_ROPE}), ("qwen2", {}),
     ("qwen3", {"head_dim": 128})],
)  # fmt: skip
def test_a_gguf_file_gives_what_transformers_reads_one_tensor_at_a_time(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    donor = write_gguf(kind, tmp_path / "model.gguf", **changes).state_dict()
    source = open_source(str(tmp_path / "model.gguf"))
    assert source.bytes_read() == 0 and source.nbytes < 1.2 * sum(t.numel() for t in donor.values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    for name in source.shapes:
        assert torch.equal(source.get(name), theirs[name].float()), name
        assert (source.get(name) - donor[name]).abs().max() < 0.01 * donor[name].abs().max(), name
    assert source.bytes_read() == 2 * source.nbytes and theirs.keys() - source.shapes.keys() <= {"lm_head.weight"}


def test_scaled_positions_are_refused(tmp_path: Path) -> None:
    """transformers 5.23 leaves them out of these architectures' configs, so that a proof compares two wrong models."""
    write_gguf("qwen2", tmp_path / "model.gguf", scaling="yarn")
    with pytest.raises(UserError, match="scales its rotary positions"):
        open_source(str(tmp_path / "model.gguf"))
    write_gguf("qwen2", tmp_path / "model.gguf", scaling="none")
    open_source(str(tmp_path / "model.gguf"))


def test_a_damaged_gguf_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match=r"model\.gguf"):
        open_source(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("split", "pieces"),
    [("smollm", ["Ġ", "2", "0", "Ġa"]), ("gpt-2", ["Ġ20", "Ġa"]), ("qwen2", ["Ġ20", "Ġa"]), ("poro-chat", None),
     ("default", None), (None, None)],
)  # fmt: skip
def test_a_tokenizer_splits_text_as_its_file_says_or_is_not_taken(
    split: str | None, pieces: list[str] | None
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = with_split(PreTrainedTokenizerFast(tokenizer_object=backend), split)
    by = None if found is None else found.backend_tokenizer.pre_tokenizer.pre_tokenize_str(" 20 a")
    assert (by and [piece for piece, _ in by]) == pieces


def test_a_name_of_a_split_says_more_than_the_split() -> None:
    """As llama.cpp and the models' own tokenizers have it: BOS and whole words of Llama 3, NFC of Qwen 2."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"h": 0, "e": 1, "he": 2, "hello": 3, "l": 4, "o": 5, "<s>": 6, "lo": 7}

    def made(split: str, begins: bool | None = None) -> Any:
        backend = Tokenizer(models.BPE(vocab=words, merges=[("h", "e"), ("l", "o")]))
        return with_split(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), split, begins)

    assert made("gpt-2")("hello")["input_ids"] == [2, 4, 7]
    assert made("llama-bpe")("hello")["input_ids"] == [6, 3]
    assert made("llama-bpe", begins=False)("hello")["input_ids"] == [3]
    assert made("qwen2").backend_tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"
