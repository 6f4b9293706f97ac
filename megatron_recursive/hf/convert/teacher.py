"""The model of a folder as a frozen Megatron model, all of it on a pipeline stage, over its tensor-parallel ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.donor_import import PLAIN, TOKENIZER, checkpoint_fetch, donor_tokenizer
from megatron_recursive.hf.convert.export import open_checkpoint
from megatron_recursive.hf.convert.mappings import items
from megatron_recursive.hf.convert.proof import build_megatron, checkpoint_key
from megatron_recursive.hf.convert.sources import open_source
from megatron_recursive.hf.convert.tokenizer_files import tokenizer_of
from megatron_recursive.plan import RecursionConfig

ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")  # one a token of the vocabulary


@dataclass(frozen=True)
class Donor:
    """A model whose weights are not yet read.

    Attributes:
        fetch: gives a tensor by its checkpoint key, that of a layer with its number in it.
        tokenizer: transformers' own; None where there is none that loads.
        checkpoint, args: the iteration's folder and its arguments, of a Megatron checkpoint.
        folder: of its files; a GGUF file is that file.
    """

    arch: Architecture
    recursion: RecursionConfig
    fetch: Callable[[str], Tensor]
    tokenizer: Any
    checkpoint: Path | None = None
    folder: Path | None = None
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, rows: int, dtype: torch.dtype, rank: int, size: int) -> Any:
        """This tensor-parallel rank's shard of it, with so many rows of the vocabulary in all, those beyond its own at
        zero. It is not this process's pipeline stage, but the whole model."""
        arch = dataclasses.replace(self.arch, padded_vocab_size=rows)
        model = build_megatron(arch, self.recursion, dtype, tp=size, whole=True)
        tensors = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if "initial_" in n}}
        for name, target in tensors.items():
            tensor = self.fetch(checkpoint_key(name))
            if name in ROWS:
                tensor = F.pad(tensor[: arch.vocab_size], (0, 0, 0, rows - arch.vocab_size))
            halves = arch.gated and "linear_fc1" in name and "norm" not in name  # gate and up lie in one
            target.data.copy_(_shard(tensor, target.shape, rank, size, 2 if halves else 1))
        # Megatron makes learned positions in fp32; its own training casts them.
        return model.to(torch.cuda.current_device(), dtype).requires_grad_(False).eval()


def _shard(tensor: Tensor, shape: torch.Size, rank: int, size: int, parts: int) -> Tensor:
    """The rank's part along the dimension in which its own shape differs, of each of so many parts side by side."""
    for dim, (whole, mine) in enumerate(zip(tensor.shape, shape, strict=True)):
        if whole != mine:
            return torch.cat([part.chunk(size, dim)[rank] for part in tensor.chunk(parts, dim)], dim)
    return tensor


def open_donor(given: str) -> Donor:
    """A Megatron checkpoint, a Hugging Face folder or cached name, or a GGUF file.

    Raises:
        UserError: it cannot be read, in one sentence.
    """
    if Path(given).is_dir() and not (Path(given) / "config.json").is_file():
        found = open_checkpoint(given, checked=False)  # its files' checksums are every rank's to look at together
        if found.lora is not None:
            raise UserError(f"{given} holds adapters (--lora-rank); export it (convert export) and name the export.")
        folder = found.checkpoint.folder
        places = (each / TOKENIZER for each in (folder, folder.parent))
        tokenizer = next((tokenizer_of(each) for each in places if each.is_dir()), None)
        return Donor(found.arch, found.recursion, checkpoint_fetch(found.checkpoint), tokenizer, folder, folder,
                     found.args)  # fmt: skip
    source = open_source(given)
    known = {item.name: item for item in items(source.family, source.arch, extra=source.extra_rows())}

    def fetch(key: str) -> Tensor:
        item = known[key]
        return item.transform.merge([source.weight(name) for name in item.hf], source.arch)

    recursion = source.own_recursion or PLAIN
    if source.family.own_class and source.config.recursion:
        recursion = RecursionConfig.from_stored(source.config.recursion)
        recursion = recursion.resolved(embedding_init_std=1.0, from_plain_gpt=True)
    return Donor(source.arch, recursion, fetch, donor_tokenizer(source), folder=source.folder or source.gguf)
