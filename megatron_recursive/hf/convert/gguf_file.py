"""A GGUF file's tensors under Hugging Face's names, dequantised to float32 one at a time, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.command_line import missing_package
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.tokenizer_files import tokenizer_of
from megatron_recursive.hf.convert.transforms import half_split

SUFFIXES = (".weight", ".bias")
# What llama.cpp's names of byte-level splits mean, of those that transformers takes for GPT-2's: it, or it with each
# digit apart.
AS_GPT2 = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling")
DIGITS_APART = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
# With these a text begins with BOS, unless the file says otherwise, and what is in the vocabulary needs no merges.
AS_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")


class GgufFile:
    """The tensors of a file, of which only the header is read when it is opened.

    Attributes:
        shapes: by Hugging Face's names; a tensor that has none keeps its own.
        nbytes: as stored; bytes_read: the same, so far.

    Raises:
        UserError: the file is damaged, or of an architecture or quantisation that the package gguf does not know.
    """

    def __init__(self, path: Path, names: Iterable[str], arch: Architecture) -> None:
        try:
            import gguf
        except ImportError as error:
            raise missing_package("gguf") from error
        self._path, self._arch, self.bytes_read = path, arch, 0
        try:
            reader = gguf.GGUFReader(path)
            kind = reader.fields["general.architecture"].contents()
            known = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
        except (ValueError, KeyError, IndexError, StopIteration) as error:
            raise UserError(f"{path} is no GGUF file that can be read ({type(error).__name__}: {error}).") from error
        scaling = reader.fields.get(f"{kind}.rope.scaling.type")
        is_scaled = f"{kind}.rope.scale_linear" in reader.fields  # of old files
        if is_scaled or scaling is not None and scaling.contents() != "none":
            raise UserError(f"{path} scales its rotary positions, which transformers does not read from GGUF; import "
                            "the model's safetensors.")  # fmt: skip
        table = gguf.get_tensor_name_map(known, arch.num_layers)
        ours = {str(table.get_name(name, SUFFIXES)): name for name in names}
        # llama.cpp stores rows of queries and keys of this architecture in the order in which it rotates pairs.
        self._is_paired = kind == "llama"
        self._dequantize = gguf.dequantize
        self._tensors: dict[str, Any] = {ours.get(tensor.name, tensor.name): tensor for tensor in reader.tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.nbytes = sum(int(tensor.n_bytes) for tensor in self._tensors.values())

    def get(self, name: str) -> Tensor:
        stored = self._tensors[name]  # its data is a map of the file, whose pages would count as this process's memory
        with open(self._path, "rb") as stream:
            stream.seek(stored.data_offset)
            raw = torch.frombuffer(bytearray(stream.read(stored.data.nbytes)), dtype=torch.uint8)
        self.bytes_read += raw.nbytes
        try:
            data = raw.numpy().view(stored.data.dtype).reshape(stored.data.shape)
            values = self._dequantize(data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self._path}: {name} cannot be dequantised ({error}).") from error
        tensor = torch.from_numpy(values).float().reshape(self.shapes[name])
        heads = {"q_proj": self._arch.num_attention_heads, "k_proj": self._arch.num_query_groups}
        module = name.split(".")[-2]
        return half_split(tensor, heads[module]) if self._is_paired and module in heads else tensor


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a file; None where transformers builds none, or one that would split text otherwise."""
    tokenizer = tokenizer_of(path.parent, gguf_file=path.name)
    if tokenizer is None:
        return None
    import gguf

    fields = gguf.GGUFReader(path).fields
    kind, split, begins = (field and field.contents() for field in (
        fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "add_bos_token")))  # fmt: skip
    return tokenizer if kind != "gpt2" else with_split(tokenizer, split, begins)


def with_split(tokenizer: Any, split: str | None, begins: bool | None = None) -> Any:
    """A byte-level tokenizer that reads text as ``tokenizer.ggml.pre`` says; None where that is not known here.

    transformers takes the split of some names, and nothing else that the name implies in llama.cpp and the model's own
    tokenizer. Files without a name are of before it was written, and of any split.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if split in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif split in AS_LLAMA3:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        tokenizer.add_bos_token = begins is not False and tokenizer.bos_token_id is not None
    elif split == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    elif split not in AS_GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
        return None
    return tokenizer
