"""Safetensors folders: checked when opened, read one tensor at a time, written one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_recursive.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9

# safetensors' names of the dtypes that weights have; others (FP8, packed integers) mean a quantised model.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class SafetensorsFolder:
    """The tensors of a folder. The headers of all files are read, and the files' lengths checked, when it is opened.

    Attributes:
        shapes, dtypes: by tensor name; a dtype is safetensors' own name for it.
        nbytes: of all files together; bytes_read: of tensors, so far.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    bytes_read: int = 0
    _files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> SafetensorsFolder:
        """Raises UserError where a file is missing, damaged, or holds other tensors than the index says."""
        found = cls(folder)
        index = _read_index(folder)
        for file in _files_of(folder, index):
            found._add(file)
        if index is not None:
            missing, surplus = sorted(index.keys() - found._files.keys()), sorted(found._files.keys() - index.keys())
            if missing or surplus:
                what = f"does not hold {missing[0]}" if missing else f"holds {surplus[0]} besides"
                raise UserError(f"{folder} {what}, against its {INDEX}; fetch the model again.")
        return found

    def _add(self, file: Path) -> None:
        self.nbytes += file.stat().st_size
        for name, (dtype, shape) in read_header(file).items():
            if name in self._files:
                raise UserError(f"{name} is in both {self._files[name].name} and {file.name} of {self.folder}.")
            self._files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype

    def names(self) -> list[str]:
        return list(self._files)

    def get(self, name: str) -> Tensor:
        # Opened anew each time: pages of a file that stays mapped would count as this process's memory.
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name to (dtype, shape); the library holds the file's length against the header's offsets."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} is damaged or no safetensors file ({reason}); fetch it again.") from error


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(index, dict) and all(isinstance(file, str) for file in index.values())):
            raise ValueError("weight_map is no map of names to files")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); fetch it again.") from error
    return index


def _files_of(folder: Path, index: dict[str, str] | None) -> list[Path]:
    if index is not None:
        files = [folder / name for name in sorted(set(index.values()))]
        for file in files:
            if file.parent != folder:
                raise UserError(f"{folder / INDEX} names {file}, outside of its folder.")
            if not file.is_file():
                raise UserError(f"{file} is missing, which {INDEX} names; fetch the model again.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE) in files:
        return [folder / SINGLE]
    if len(files) == 1:
        return files
    if files:
        raise UserError(f"{folder} holds {len(files)} safetensors files but no {INDEX}; fetch the model again.")
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
    if pickled:
        raise UserError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code and are never read here; load them "
            "where you trust them and write safetensors with save_pretrained."
        )
    if list(folder.glob("*.gguf")):
        raise UserError(f"{folder} holds GGUF files; name one of them instead of the folder.")
    raise UserError(f"{folder} holds no *.safetensors file; give a Hugging Face model folder.")


# --- writing --------------------------------------------------------------------------------------------------------


class FolderWriter:
    """Writes the promised tensors one at a time, in any order: the library's own writer wants a whole shard in memory.

    Args:
        promised: what will be written, on the meta device.
    """

    def __init__(self, folder: Path, promised: dict[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._missing = folder, dict(promised)
        self._split = split_torch_state_dict_into_shards(promised, max_shard_size=shard_bytes)
        self._starts: dict[str, int] = {}
        for file, names in self._split.filename_to_tensors.items():
            header = _header({name: promised[name] for name in names})
            (folder / file).write_bytes(header)
            start = len(header)
            for name in names:
                self._starts[name] = start
                start += promised[name].nbytes

    def add(self, name: str, tensor: Tensor) -> None:
        promised = self._missing.pop(name)
        assert (tensor.shape, tensor.dtype) == (promised.shape, promised.dtype), name
        with open(self._folder / self._split.tensor_to_filename[name], "r+b") as shard:
            shard.seek(self._starts[name])
            shard.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        assert not self._missing, [*self._missing]
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_folder(
    folder: Path, promised: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a whole folder."""
    writer = FolderWriter(folder, promised, shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.close()


def _header(promised: dict[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in promised.items():
        offsets = [start, start + tensor.nbytes]
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return struct.pack("<Q", len(text)) + text
