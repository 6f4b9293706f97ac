"""Megatron's ``torch_dist`` checkpoints, read and written one tensor at a time without building a model.

The format is torch's distributed checkpoint: files of ``torch.save``d pieces, and an index ``.metadata`` that says
which piece lies where. Layers are stacked: ``decoder.layers.mlp.linear_fc2.weight`` is [L, H, F]. How many ranks wrote
the checkpoint shows only in the number of pieces. The index is a pickle; it is read by an unpickler that knows the
dozen record types of the format and nothing else, and the pieces are read with ``weights_only=True``. Megatron-Core
before 0.19 keeps what is no tensor in a file of its own, ``common.pt``, which is read so too.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from megatron_recursive.errors import UserError
from megatron_recursive.models.stored_arguments import TRACKER, name_as_today

LAYERS = "decoder.layers."
AVERAGE = "optimizer.state.ema."  # the average of a weight (optimizers/weight_average.py), before its key
COMMON = "common_state/shard_0_1"  # a sharded object's key in the index: name, number, of how many
COMMON_FILE = "common.pt"  # the same, before Megatron-Core 0.19
DATA_FILE = "__0_0.distcp"
PIECE_BYTES = 64 * 2**20  # larger tensors are written in pieces of rows, so that a reader need not hold them whole

_RECORDS = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.planner": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}
# What Megatron-Core before 0.19 derived from torch's records, and a path, which torch keeps in one of them.
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_READ_AS = {
    (_MEGATRON, "MCoreMetadata"): Metadata, (_MEGATRON, "MCoreSavePlan"): SavePlan,
    ("pathlib", "PosixPath"): PurePosixPath, ("pathlib._local", "PosixPath"): PurePosixPath,
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Knows the record types of a checkpoint's index, dtypes and layouts; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _READ_AS:
            return _READ_AS[module, name]
        if module in _RECORDS and "." not in name:
            allowed = _RECORDS[module]
            found = getattr(__import__(module, fromlist=[name]), name, None)
            own = isinstance(found, type) and found.__module__ == module
            if found is not None and (own if allowed is None else name in allowed):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UserError(f"a checkpoint's index may not hold {module}.{name}")


class TorchDistCheckpoint:
    """One iteration's folder.

    Attributes:
        shapes, dtypes: of the model's tensors by key; optimizer and random states are left out. ``averaged`` reads the
            average of each weight in its place, in its dtype.
        bytes_read: of the files behind the index, so far.
    """

    def __init__(self, folder: Path, *, averaged: bool = False) -> None:
        self.folder, self.bytes_read = folder, 0
        try:
            with open(folder / ".metadata", "rb") as stream:
                self._index: Metadata = _IndexUnpickler(stream).load()
            entries = self._index.state_dict_metadata
            tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, UserError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise UserError(f"The checkpoint {folder} cannot be read ({reason}); name another one.") from error
        self._tensors = {k: v for k, v in tensors.items() if not k.startswith(("optimizer.", "chained_"))}
        self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in self._tensors.items()}
        self.nbytes = sum(e.size.numel() * e.properties.dtype.itemsize for e in self._tensors.values())
        self._stored = {k: AVERAGE + k for k in self._tensors if averaged and AVERAGE + k in tensors}
        if averaged and not self._stored:
            raise UserError(
                f"The checkpoint {folder} holds no averaged weights in the model's shape, which --ema-decay writes "
                "without --no-dist-ckpt-optim-fully-reshardable; leave --ema out."
            )
        self.training_state = len(tensors) - len(self._tensors)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the run that wrote the checkpoint, by name."""
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        info, file = self._index.storage_data.get(MetadataIndex(COMMON)), self.folder / COMMON_FILE
        common: dict[str, Any] = {}
        if file.is_file():  # comes first, as Megatron has it
            common = self._unpickled(file, file.read_bytes())
        elif info is not None:
            (common,) = self._load(info)
        args = common.get("args")
        if args is None:
            raise UserError(f"The checkpoint {self.folder} stores no arguments, so that its architecture is unknown.")
        name_as_today(args)
        return dict(vars(args))

    def get(self, key: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or the slice of a stacked one that belongs to a layer."""
        stored = self._stored.get(key, key)
        entry: TensorStorageMetadata = self._index.state_dict_metadata[stored]  # type: ignore[assignment]
        start, size = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            start[0], size[0] = layer, 1
        result = torch.empty(size, dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            piece = self._load(self._index.storage_data[MetadataIndex(stored, chunk.offsets)])
            theirs = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            mine = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
            result[mine].copy_(piece[theirs])
            filled += result[mine].numel()
        if filled != result.numel():
            raise UserError(f"The checkpoint {self.folder} does not hold all of {key}.")
        result = result if stored == key else result.to(self.dtypes[key])  # an average, in fp32
        return result if layer is None else result[0]

    def _load(self, info: _StorageInfo) -> Any:
        path = self.folder / info.relative_path
        try:
            with open(path, "rb") as stream:
                stream.seek(info.offset)
                data = stream.read(info.length)
            self.bytes_read += len(data)
            if len(data) != info.length:
                raise ValueError("the file is too short")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
        return self._unpickled(path, data)

    def _unpickled(self, path: Path, data: bytes) -> Any:
        try:
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            why = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())  # torch leads with an essay
            raise UserError(f"{path} is damaged ({type(error).__name__}: {why[:120]}).") from error


def iteration_folder(path: Path) -> Path:
    """The iteration's folder: the path itself, or the one that the tracker file in it names."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise UserError(f"{path} is no torch_dist checkpoint: neither .metadata nor {TRACKER} is there.")
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise UserError(f"{tracker} must hold an iteration number, but holds {text[:40]!r}.")
    return path / ("release" if text == "release" else f"iter_{int(text):07d}")


class TorchDistWriter:
    """Writes a checkpoint tensor by tensor; :meth:`close` writes the index, without which the folder is none.

    Attributes:
        sha256: of the file of tensors, so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._stream, self.sha256 = open(folder / DATA_FILE, "wb"), hashlib.sha256()
        self._entries: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, tensor: Tensor, layer: int | None = None, num_layers: int | None = None) -> None:
        """A tensor, or layer ``layer`` of a stacked one of ``num_layers``."""
        lead = () if layer is None else (1,)
        size = tensor.shape if layer is None else torch.Size((num_layers or 0, *tensor.shape))
        if key not in self._entries:
            self._entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(size), [])
        entry = self._entries[key]
        if entry.properties.dtype != tensor.dtype or entry.size != size:
            raise UserError(
                f"The layers of {key} differ in dtype or shape ({entry.properties.dtype} {tuple(entry.size)}, "
                f"{tensor.dtype} {tuple(size)}), which a checkpoint of stacked layers cannot hold."
            )
        row_bytes = max(tensor[:1].nbytes, 1) if tensor.ndim else 1
        for first, rows in _row_pieces(tensor, max(PIECE_BYTES // row_bytes, 1)):
            within = (first, *[0] * (tensor.ndim - 1)) if tensor.ndim else ()
            offsets = torch.Size((*(() if layer is None else (layer,)), *within))
            piece = rows.clone(memory_format=torch.contiguous_format).reshape(*lead, *rows.shape)  # storage of its own
            entry.chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            self._write(MetadataIndex(key, offsets, len(entry.chunks) - 1), piece)

    def add_common(self, common: dict[str, Any]) -> None:
        """What is no tensor: primitives, and the arguments as a namespace of primitives."""
        self._entries[COMMON] = BytesStorageMetadata()
        self._write(MetadataIndex(COMMON), [common])

    def _write(self, index: MetadataIndex, data: Any) -> None:
        buffer = io.BytesIO()
        torch.save(data, buffer)
        offset = self._stream.tell()
        self._stream.write(buffer.getbuffer())
        self.sha256.update(buffer.getbuffer())
        self._places[index] = _StorageInfo(DATA_FILE, offset, len(buffer.getbuffer()))

    def close(self) -> None:
        self._stream.close()
        with open(self.folder / ".metadata", "wb") as stream:
            pickle.dump(Metadata(self._entries, storage_data=self._places), stream)
        (self.folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')

    def abort(self) -> None:
        self._stream.close()


def _row_pieces(tensor: Tensor, rows: int) -> Iterable[tuple[int, Tensor]]:
    if tensor.ndim == 0 or tensor.shape[0] <= rows:
        return [(0, tensor)]
    return [(first, tensor[first : first + rows]) for first in range(0, tensor.shape[0], rows)]


