"""Made-up tasks that need depth, as datasets of documents of one length: questions and, between them, answers.

A looped model is known to beat its own layers on them (Saunshi et al. 2025, arXiv 2502.17416; k-hop induction is of
Sanford et al. 2024, arXiv 2402.09268). All tasks share one vocabulary, in which ids alone tell what is an answer:

    0 filler    1 to 31 the level of the document, once in it    32 to 63 symbols    64 to 95 answers

An answer is predicted at the token before it, and is not read itself (--answer-tokens): earlier answers are a shortcut
on which training settles. A document has exactly ``seq_length`` tokens: Megatron's GPTDataset advances by as many, so
that a sample is a document, and its last label, the first token of the next, is no answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_recursive.data.files import replacing
from megatron_recursive.data.indexed import check_indexed_dataset, token_type, write_index
from megatron_recursive.data.preparation import SUFFIX, Preparation, digest, read_preparation
from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Ids = NDArray[numpy.unsignedinteger[Any]]

FILLER, SYMBOLS, ANSWERS, NONE = 0, 32, 64, 95
PLUS, EQUALS = SYMBOLS + 10, SYMBOLS + 11
VOCAB_SIZE = 128  # the last id is NullTokenizer's end of a document, which no document has
LEVEL_NAMES = {"megatron-recursive task hops": "hops", "megatron-recursive task addition": "summands"}
"""What stands in a record in the place of a tokenizer, and what the levels of that task are called."""
_CHUNK = 4096  # documents made at a time: a part of what a seed means
_TRIES = 32  # to draw a held-out document that is not among those of training


@dataclass(frozen=True)
class Hops:
    """k-hop induction: from a symbol to the successor of its last earlier occurrence, k times.

    ``q1 LEVEL q2 a2 q3 a3 ...``: the level is k, and an answer is the symbol where the k-th hop of its question ends,
    or NONE where a hop finds no earlier occurrence. (q1 never has one, so that the level takes the place of a1.) No
    symbol follows itself, since it would hop onto itself for ever.

    Attributes:
        levels: each document draws its k among these. alphabet: different symbols. length: symbols of a document.
    """

    levels: tuple[int, ...] = (1, 2, 3, 4)
    alphabet: int = 4
    length: int = 48
    made_by, level_at = "megatron-recursive task hops", 1

    def __post_init__(self) -> None:
        _check("--hops", self.levels, 1, SYMBOLS - 1)
        _check("--alphabet", [self.alphabet], 3, NONE - ANSWERS)
        _check("--length", [self.length], 2, 2**14)

    @property
    def seq_length(self) -> int:
        return 2 * self.length

    def different(self, level: int) -> int:
        """How many different documents of a level there are."""
        return self.alphabet * (self.alphabet - 1) ** (self.length - 1)

    def documents(self, random: numpy.random.Generator, count: int) -> Ids:
        """[count, seq_length] token ids."""
        import numpy

        level_N = random.choice(numpy.array(self.levels), count)
        step_NL = random.integers(1, self.alphabet, size=(count, self.length))
        symbol_NL = (random.integers(self.alphabet, size=(count, 1)) + step_NL.cumsum(1)) % self.alphabet
        # Where one hop leads, by position; -1: nowhere, and from there (the last column) nowhere again.
        hop_NL = numpy.full((count, self.length + 1), -1)
        seen_NA = numpy.full((count, self.alphabet), -2)
        for position in range(self.length):
            here = numpy.arange(count), symbol_NL[:, position]
            hop_NL[:, position] = numpy.maximum(seen_NA[here] + 1, -1)
            seen_NA[here] = position
        end_NL = numpy.tile(numpy.arange(self.length), (count, 1))
        for done in range(max(self.levels)):
            end_NL = numpy.where((done < level_N)[:, None], numpy.take_along_axis(hop_NL, end_NL, 1), end_NL)
        answer_NL = ANSWERS + numpy.take_along_axis(symbol_NL, numpy.maximum(end_NL, 0), 1)
        ids_NS = numpy.empty((count, self.seq_length), numpy.uint16)
        ids_NS[:, ::2] = SYMBOLS + symbol_NL
        ids_NS[:, 1::2] = numpy.where(end_NL < 0, NONE, answer_NL)
        ids_NS[:, 1] = level_N
        return ids_NS


@dataclass(frozen=True)
class Addition:
    """Addition of several numbers: ``LEVEL 5 1 3 + 0 2 1 = 5 3 4 0``, and filler up to the length of the longest.

    Digits stand with the least significant first, the sum's too.

    Attributes:
        levels: each document draws among these how many numbers it adds. digits: of a number.
    """

    levels: tuple[int, ...] = (2, 3, 4)
    digits: int = 3
    made_by, level_at = "megatron-recursive task addition", 0

    def __post_init__(self) -> None:
        _check("--summands", self.levels, 2, SYMBOLS - 1)
        _check("--digits", [self.digits], 1, 15)

    @property
    def answer_digits(self) -> int:
        return len(str(max(self.levels) * (10**self.digits - 1)))

    @property
    def seq_length(self) -> int:
        return 1 + max(self.levels) * (self.digits + 1) + self.answer_digits

    def different(self, level: int) -> int:
        """How many different documents of a level there are."""
        return 10 ** (self.digits * level)

    def documents(self, random: numpy.random.Generator, count: int) -> Ids:
        """[count, seq_length] token ids."""
        import numpy

        most = max(self.levels)
        level_N = random.choice(numpy.array(self.levels), count)
        digit_NMD = random.integers(10, size=(count, most, self.digits))
        digit_NMD *= numpy.arange(most)[:, None] < level_N[:, None, None]
        sum_N = (digit_NMD * 10 ** numpy.arange(self.digits)).sum((1, 2))
        answer_NA = ANSWERS + sum_N[:, None] // 10 ** numpy.arange(self.answer_digits) % 10
        ids_NS = numpy.full((count, self.seq_length), FILLER, numpy.uint16)
        ids_NS[:, 0] = level_N
        for level in set(self.levels):
            rows, end = numpy.flatnonzero(level_N == level), 1 + level * (self.digits + 1)
            numbers_RMD = numpy.full((len(rows), level, self.digits + 1), PLUS)
            numbers_RMD[:, :, :-1] = SYMBOLS + digit_NMD[rows, :level]
            numbers_RMD[:, -1, -1] = EQUALS
            ids_NS[rows, 1:end] = numbers_RMD.reshape(len(rows), end - 1)
            ids_NS[rows, end : end + self.answer_digits] = answer_NA[rows]
        return ids_NS


def _check(flag: str, values: Iterable[int], least: int, most: int) -> None:
    for value in values:
        if not least <= value <= most:
            raise UserError(f"{flag} must lie between {least} and {most}, but is {value}.")


def may_share(task: Hops | Addition, one: int, other: int) -> bool:
    """Whether so many documents and so many others, drawn at random, may have one in common."""
    in_common = sum(1 / task.different(level) for level in task.levels) * one * other / len(task.levels) ** 2
    return in_common > 1e-3


def share_in(prefix: Path, others: Path) -> float:
    """The share of the documents at ``prefix`` that are at ``others`` too."""
    import numpy

    one, other = (_keys(read_task(str(each))[1]) for each in (prefix, others))
    return float(numpy.isin(one, other).mean())


def _keys(ids_NS: Ids) -> NDArray[numpy.uint64]:
    """A number [N] for each document, which two different ones share once in 2^64."""
    import numpy

    factors_S = numpy.random.default_rng(0).integers(2**64, size=ids_NS.shape[1], dtype="u8")
    chunks = [ids_NS[start : start + _CHUNK] for start in range(0, len(ids_NS), _CHUNK)]
    return numpy.concatenate([(each * factors_S).sum(1, dtype="u8") for each in chunks])


def _draw_again(task: Hops | Addition, ids_NS: Ids, random: numpy.random.Generator, known: NDArray[Any]) -> None:
    """Replace documents that are known by others of their level, as far as such are found."""
    import numpy

    for _ in range(_TRIES):
        rows = numpy.flatnonzero(numpy.isin(_keys(ids_NS), known))
        if not len(rows):
            return
        drawn_NS = task.documents(random, len(ids_NS))
        drawn_NS = drawn_NS[~numpy.isin(_keys(drawn_NS), known)]
        for level in task.levels:
            old, new = (each[ids[each, task.level_at] == level]
                        for ids, each in ((ids_NS, rows), (drawn_NS, numpy.arange(len(drawn_NS)))))  # fmt: skip
            ids_NS[old[: len(new)]] = drawn_NS[new[: len(old)]]


def write_task(
    task: Hops | Addition, prefix: Path, documents: int, seed: tuple[int, int], apart_from: Path | None = None
) -> bool:
    """Write ``PREFIX.bin``, ``.idx`` and their record; the same task, count and seed give the same bytes.

    Args:
        apart_from: documents of this task are drawn again, as far as others of their level are found.

    Returns:
        False if they are there already.

    Raises:
        UserError: other files are there (a cache of Megatron's may know them by their name), or they cannot be written.
    """
    import numpy

    facts: dict[str, Any] = {"task": task.made_by, **asdict(task), "documents": documents, "seed": seed}
    before = digest(facts)
    if apart_from is not None and (others := read_preparation(apart_from)) is not None:
        facts["apart"] = others.source
    source = digest(facts)
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if bin_file.exists() or idx_file.exists():
        made = read_preparation(prefix)
        if made is not None and made.source == source and idx_file.exists():
            return False
        if made is not None and made.source == before:
            raise UserError(f"{bin_file} is of a version that did not keep it apart from train; remove {prefix}.*.")
        raise UserError(f"{bin_file} is there already, and another task or half of one; choose another --output.")
    random = numpy.random.default_rng(seed)
    known = None if apart_from is None else numpy.unique(_keys(read_task(str(apart_from))[1]))
    with replacing(bin_file, Path(f"{prefix}{SUFFIX}"), idx_file) as (bin_part, record_part, idx_part):
        token = token_type(VOCAB_SIZE)
        with open(bin_part, "wb") as stream:
            for start in range(0, documents, _CHUNK):
                ids_NS = task.documents(random, min(_CHUNK, documents - start))
                if known is not None:
                    _draw_again(task, ids_NS, numpy.random.default_rng((*seed, start)), known)
                stream.write(ids_NS.astype(token).tobytes())
        write_index(idx_part, token, lambda: [numpy.full(documents, task.seq_length)])
        record_part.write_text(Preparation(
            VOCAB_SIZE, digest({"vocabulary": "tasks"}), task.made_by, source, documents,
            documents * task.seq_length, 0, bin_part.stat().st_size,
        ).to_json(), "utf-8")  # fmt: skip
    return True


def read_task(prefix: str) -> tuple[str, Ids]:
    """What the levels of a task are called, and its documents, [N, seq_length].

    Raises:
        UserError: the dataset is damaged, or no task of :func:`write_task`.
    """
    import numpy

    check_indexed_dataset(prefix)
    made = read_preparation(prefix)
    if made is None or made.tokenizer not in LEVEL_NAMES:
        raise UserError(f"--data {prefix} is no task that megatron-recursive task has made; give the prefix of one.")
    return LEVEL_NAMES[made.tokenizer], numpy.fromfile(f"{prefix}.bin", "u2").reshape(made.documents, -1)
