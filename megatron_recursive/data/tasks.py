"""Made-up tasks that need depth, as datasets of documents of one length: questions and, between them, answers.

A looped model is known to beat its own layers on them (Saunshi et al. 2025, arXiv 2502.17416; k-hop induction is of
Sanford et al. 2024, arXiv 2402.09268). All tasks share one vocabulary, in which ids alone tell what is an answer:

    0 filler    1 to 31 the level of the document, once in it    32 to 63 symbols    64 to 95 answers

An answer is predicted at the token before it. A document has exactly ``seq_length`` tokens: Megatron's GPTDataset
advances by as many, so that a sample is a document, and its last label, the first token of the next, is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_recursive.data.files import replacing
from megatron_recursive.data.indexed import check_indexed_dataset, megatron_indexed_dataset
from megatron_recursive.data.preparation import Preparation, preparation_file, read_preparation, source_digest
from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Ids = NDArray[numpy.unsignedinteger[Any]]

FILLER, SYMBOLS, ANSWERS, NONE = 0, 32, 64, 95
VOCAB_SIZE = 128  # the last id is NullTokenizer's end of a document, which no document has
MAX_LEVEL = SYMBOLS - 1
PLUS, EQUALS = SYMBOLS + 10, SYMBOLS + 11
_CHUNK = 4096  # documents made at a time: a part of what a seed means
_MADE_BY = "megatron-recursive task "  # in the record, where a tokenizer would stand


@dataclass(frozen=True)
class Hops:
    """k-hop induction: from a symbol to the successor of its last earlier occurrence, k times.

    ``q1 LEVEL q2 a2 q3 a3 ...``: the level is k, and an answer is the symbol where the k-th hop of its question ends,
    or NONE where a hop finds no earlier occurrence. (q1 never has one, so that the level takes the place of a1.)

    Attributes:
        levels: each document draws its k among these. alphabet: different symbols. length: symbols of a document.
    """

    levels: tuple[int, ...] = (4,)
    alphabet: int = 4
    length: int = 48
    name: ClassVar[str] = "hops"
    level_name: ClassVar[str] = "hops"

    def __post_init__(self) -> None:
        _check("--hops", self.levels, 1, MAX_LEVEL)
        _check("--alphabet", [self.alphabet], 2, NONE - ANSWERS)
        _check("--length", [self.length], 2, 2**14)

    @property
    def seq_length(self) -> int:
        return 2 * self.length

    def documents(self, random: numpy.random.Generator, count: int) -> Ids:
        """[count, seq_length] token ids."""
        import numpy

        level_N = random.choice(numpy.array(self.levels), count)
        symbol_NL = random.integers(self.alphabet, size=(count, self.length))
        # Where one hop leads, by position; -1: nowhere, and from there (the last column) nowhere again. A symbol that
        # follows itself leads to its own position.
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

    Digits stand with the least significant first, the sum's too, so that an answer needs the carry of those before it.

    Attributes:
        levels: each document draws among these how many numbers it adds. digits: of a number.
    """

    levels: tuple[int, ...] = (2, 3, 4)
    digits: int = 3
    name: ClassVar[str] = "addition"
    level_name: ClassVar[str] = "summands"

    def __post_init__(self) -> None:
        _check("--summands", self.levels, 2, MAX_LEVEL)
        _check("--digits", [self.digits], 1, 15)

    @property
    def answer_digits(self) -> int:
        return len(str(max(self.levels) * (10**self.digits - 1)))

    @property
    def seq_length(self) -> int:
        return 1 + max(self.levels) * (self.digits + 1) + self.answer_digits

    def documents(self, random: numpy.random.Generator, count: int) -> Ids:
        """[count, seq_length] token ids."""
        import numpy

        most = max(self.levels)
        level_N = random.choice(numpy.array(self.levels), count)
        digit_NMD = random.integers(10, size=(count, most, self.digits))
        digit_NMD *= numpy.arange(most)[:, None] < level_N[:, None, None]
        sum_N = (digit_NMD * 10 ** numpy.arange(self.digits)).sum((1, 2))
        answer_NA = sum_N[:, None] // 10 ** numpy.arange(self.answer_digits) % 10
        ids_NS = numpy.full((count, self.seq_length), FILLER, numpy.uint16)
        ids_NS[:, 0] = level_N
        for level in set(self.levels):
            rows = numpy.flatnonzero(level_N == level)
            numbers = numpy.full((len(rows), level, self.digits + 1), PLUS)
            numbers[:, :, :-1] = SYMBOLS + digit_NMD[rows, :level]
            numbers[:, -1, -1] = EQUALS
            end = 1 + numbers[0].size if len(rows) else 1
            ids_NS[rows, 1:end] = numbers.reshape(len(rows), -1)
            ids_NS[rows, end : end + self.answer_digits] = ANSWERS + answer_NA[rows]
        return ids_NS


Task = Hops | Addition


def _check(flag: str, values: Any, least: int, most: int) -> None:
    for value in values:
        if not least <= value <= most:
            raise UserError(f"{flag} must lie between {least} and {most}, but is {value}.")


def write_task(task: Task, prefix: Path, documents: int, seed: tuple[int, int]) -> bool:
    """Write ``PREFIX.bin``, ``.idx`` and their record; the same task, count and seed give the same bytes.

    Returns:
        False if they are there already.

    Raises:
        UserError: other files are there (a cache of Megatron's may know them by their name), or they cannot be written.
    """
    source = source_digest({"task": task.name, **asdict(task), "documents": documents, "seed": seed})
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if bin_file.exists() or idx_file.exists():
        made = read_preparation(prefix)
        if made is not None and made.source == source and idx_file.exists():
            return False
        raise UserError(f"{bin_file} is there already, and another task or half of one; choose another --output.")
    with replacing(bin_file, preparation_file(prefix), idx_file) as (bin_part, record_part, idx_part):
        megatron = megatron_indexed_dataset()
        builder = megatron.IndexedDatasetBuilder(str(bin_part), dtype=megatron.DType.optimal_dtype(VOCAB_SIZE))
        for ids_NS in _chunks(task, documents, seed):
            for ids in ids_NS:
                builder.add_document(ids, [task.seq_length])
        builder.finalize(str(idx_part))
        record_part.write_text(Preparation(
            VOCAB_SIZE, source_digest({"tasks": 1}), _MADE_BY + task.name, source, documents,
            documents * task.seq_length, 0, bin_part.stat().st_size,
        ).to_json(), "utf-8")  # fmt: skip
    return True


def _chunks(task: Task, documents: int, seed: tuple[int, int]) -> Iterator[Ids]:
    import numpy

    random = numpy.random.default_rng(seed)
    for start in range(0, documents, _CHUNK):
        yield task.documents(random, min(_CHUNK, documents - start))


def read_task(prefix: str) -> tuple[str, Ids]:
    """What the levels of a task are called, and its documents, [N, seq_length].

    Raises:
        UserError: the dataset is damaged, or no task of :func:`write_task`.
    """
    import numpy

    check_indexed_dataset(prefix)
    made = read_preparation(prefix)
    names = {_MADE_BY + task.name: task.level_name for task in (Hops, Addition)}
    if made is None or made.tokenizer not in names:
        raise UserError(f"--data {prefix} is no task that megatron-recursive task has made; give the prefix of one.")
    return names[made.tokenizer], numpy.fromfile(f"{prefix}.bin", "u2").reshape(made.documents, -1)
