"""A shuffle of more text than memory holds: runs of documents sorted by random keys, and slices of all of them.

The documents of all runs whose keys lie in a range are a random sample, and one range after the other, each sorted, is
all text in random order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_recursive.data.files import replacing
from megatron_recursive.errors import UserError

KEYS = 2**63  # keys are below
OVERHEAD = 250  # bytes that Python takes for a document in memory, besides its text
_HALVINGS = 64


def bundles[Key](pairs: Iterable[tuple[Key, bytes]], held_bytes: int) -> Iterator[list[tuple[Key, bytes]]]:
    """Consecutive (key, text) pairs that take about so much memory."""
    held, cost = list[tuple[Key, bytes]](), 0
    for pair in pairs:
        held.append(pair)
        cost += len(pair[1]) + OVERHEAD
        if cost >= held_bytes:
            yield held
            held, cost = [], 0
    if held:
        yield held


def spill(prefix: Path, pairs: Iterable[tuple[int, bytes]], held_bytes: int) -> None:
    """Write (key, text) pairs as runs ``PREFIX-NUMBER.text`` with their index ``.npy``."""
    for stale in prefix.parent.glob(f"{prefix.name}-*"):
        stale.unlink()
    for number, held in enumerate(bundles(pairs, held_bytes)):
        held.sort()
        index = numpy.zeros((2, len(held) + 1), numpy.uint64)
        index[0] = [*(key for key, _ in held), KEYS]
        numpy.cumsum([len(raw) for _, raw in held], out=index[1, 1:])
        run = prefix.with_name(f"{prefix.name}-{number}")
        with replacing(run.with_suffix(".text"), run.with_suffix(".npy")) as (text, keys):
            with open(text, "wb") as stream:
                stream.writelines(raw for _, raw in held)
            with open(keys, "wb") as stream:
                numpy.save(stream, index)


@dataclass(frozen=True)
class Run:
    """Documents in the order of their keys; ``index`` is [keys, where the document begins in ``text``], and the end."""

    text: Path
    index: numpy.ndarray

    @classmethod
    def open(cls, text: Path) -> Run:
        """The index is mapped, not read.

        Raises:
            UserError: the run is damaged.
        """
        try:
            index = numpy.load(text.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            if text.stat().st_size != index[1, -1]:
                raise ValueError("it was cut off")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{text} is damaged ({error}); delete its folder and run the same command again") from error
        return cls(text, index)

    def below(self, keys: numpy.ndarray) -> numpy.ndarray:
        """[2, K]: how many documents have smaller keys, and their bytes."""
        places = numpy.searchsorted(self.index[0], keys)
        return numpy.stack((places, self.index[1, places])).astype(numpy.int64)

    def slice(self, low: int, high: int) -> Iterator[tuple[int, bytes]]:
        """(key, text) of the documents with keys in [low, high)."""
        start, stop = numpy.searchsorted(self.index[0], numpy.array([low, high], numpy.uint64))
        first, *ends = self.index[1, start : stop + 1].tolist()
        with open(self.text, "rb") as stream:
            stream.seek(first)
            for key, begin, end in zip(self.index[0, start:stop].tolist(), [first, *ends], ends, strict=False):
                yield key, stream.read(end - begin)


@dataclass(frozen=True)
class Cuts:
    """Of each corpus the documents with keys below ``taken`` are taken; one's place in the mixture is key / taken, from
    0 to 1, and shard s is ``places[s]`` to ``places[s + 1]``."""

    taken: list[int]
    places: list[float]

    def below(self, corpora: Sequence[Sequence[Run]], places: numpy.ndarray) -> numpy.ndarray:
        """[corpora, 2, K]: documents and bytes of each corpus before each place."""
        none = numpy.zeros((2, len(places)), numpy.int64)
        return numpy.stack([
            sum((run.below(_keys(places, top)) for run in runs), none)
            for runs, top in zip(corpora, self.taken, strict=True)
        ])  # fmt: skip

    def slice(self, corpora: Sequence[Sequence[Run]], low: float, high: float) -> list[tuple[float, bytes]]:
        """(place, text) of the documents from one place to another, in order."""
        found = list[tuple[float, bytes]]()
        for runs, top in zip(corpora, self.taken, strict=True):
            bounds = _keys(numpy.array([low, high]), top).tolist()
            found += ((key / top, raw) for run in runs for key, raw in run.slice(*bounds))
        return sorted(found)


def make_cuts(corpora: Sequence[Sequence[Run]], weights: Sequence[float] | None, num_shards: int) -> Cuts:
    """Take all, or as much as has shares of ``weights`` in bytes of text, to a document; cut where bytes are even."""
    end = numpy.ones(1)
    sizes = Cuts([KEYS] * len(corpora), []).below(corpora, end)[:, 1, 0].tolist()
    shares = sizes if weights is None else weights
    whole = min(size / share for size, share in zip(sizes, shares, strict=True))
    taken = [_bound(runs, min(size, round(whole * share)))
             for runs, size, share in zip(corpora, sizes, shares, strict=True)]  # fmt: skip
    cuts = Cuts(taken, [])
    wanted = numpy.arange(1, num_shards) * (cuts.below(corpora, end)[:, 1].sum() / num_shards)
    low, high = numpy.zeros(num_shards - 1), numpy.ones(num_shards - 1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = cuts.below(corpora, middle)[:, 1].sum(0) >= wanted
        low, high = numpy.where(enough, low, middle), numpy.where(enough, middle, high)
    return Cuts(taken, [0.0, *high.tolist(), 1.0])


def _bound(runs: Sequence[Run], size: int) -> int:
    """The smallest key below which ``size`` bytes lie."""
    low, high = 0, KEYS
    while low < high:
        middle = (low + high) // 2
        enough = sum(int(run.below(numpy.array([middle], numpy.uint64))[1, 0]) for run in runs) >= size
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _keys(places: numpy.ndarray, top: int) -> numpy.ndarray:
    keys = numpy.minimum((places * float(top)).astype(numpy.uint64), numpy.uint64(top))
    return numpy.where(places >= 1, numpy.uint64(top), keys)
