"""A conversion reads its weights twice: where they come from, to write them, and what was written, to prove it.

The model that the weights come from asks for them as its forward pass needs them, and each is converted when it is
asked for; the model that they become reads them back, against checksums taken while they were written.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.mappings import Item

Fetch = Callable[[str], Tensor]


class Once:
    """Hands out tensors by name; each item is converted when the first of its tensors is asked for.

    Args:
        items: and the names of what each is made of; read: gives a tensor; convert: is given an item and its tensors.
    """

    def __init__(
        self, items: Iterable[tuple[Item, Sequence[str]]], read: Fetch, convert: Callable[[Item, list[Tensor]], None]
    ) -> None:
        self._waiting = {name: (item, names) for item, names in items for name in names}
        self._read, self._convert = read, convert
        self._held: dict[str, Tensor] = {}  # read for an item, and not asked for yet

    def __call__(self, name: str) -> Tensor:
        if name in self._waiting:
            self._take(name)
        return self._held.pop(name) if name in self._held else self._read(name)

    def finish(self) -> None:
        """Convert what nobody asked for."""
        while self._waiting:
            self._take(next(iter(self._waiting)))
            self._held.clear()

    def _take(self, name: str) -> None:
        item, names = self._waiting[name]
        parts = [self._read(each) for each in names]
        self._convert(item, parts)
        for each, part in zip(names, parts, strict=True):
            del self._waiting[each]
            self._held[each] = part


class Sums:
    """Checksums of tensors as they were written, held against what is read back."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}
        self.unread: dict[str, None] = {}  # in the order in which they were written

    def note(self, name: str, tensor: Tensor) -> None:
        self._sums[name], self.unread[name] = _sum(tensor), None

    def checked(self, read: Fetch) -> Fetch:
        """``read``, refusing what reads back otherwise."""

        def fetch(name: str) -> Tensor:
            tensor = read(name)
            if _sum(tensor) != self._sums[name]:
                raise UserError(f"{name} reads back otherwise than it was written; check the disk of --out.")
            self.unread.pop(name, None)
            return tensor

        return fetch


def _sum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def remembering(read: Fetch, room: int, always: Sequence[str] = ()) -> Fetch:
    """``read``, keeping tensors until ``room`` bytes are full, and those of ``always`` besides.

    What is in stays in: passes go round the layers, so that the one read last is the one needed last.
    """
    kept: dict[str, Tensor] = {}
    left = [room]

    def fetch(name: str) -> Tensor:
        if name in kept:
            return kept[name]
        tensor = read(name)
        if name in always:
            kept[name] = tensor
        elif tensor.nbytes <= left[0]:
            kept[name] = tensor
            left[0] -= tensor.nbytes
        return tensor

    return fetch


def room_for_passes(num_passes: int) -> int:
    """How many bytes to keep of what several passes read: half the memory that is free; one pass needs none."""
    if num_passes == 1:
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux, or a container that hides it
        return 0
    group = Path("/sys/fs/cgroup")  # a container's own limit; "max", or no such file: there is none
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(free, 0) // 2
