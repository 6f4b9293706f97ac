"""A GGUF file's tensors under Hugging Face's names, dequantised to float32 one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.command_line import missing_package
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture

SUFFIXES = (".weight", ".bias")


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
        return _halves(tensor, heads[module]) if self._is_paired and module in heads else tensor


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs that are rotated together to the first of each pair, then the second."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
