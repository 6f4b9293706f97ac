"""Tasks that need depth: answers held against references that read like the definitions."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from megatron_recursive.commands import main
from megatron_recursive.data.tasks import (
    ANSWERS,
    EQUALS,
    FILLER,
    NONE,
    PLUS,
    SYMBOLS,
    VOCAB_SIZE,
    Addition,
    Hops,
    read_task,
    share_in,
    write_task,
)
from megatron_recursive.errors import UserError


def hop_answer(symbols: list[int], place: int, hops: int) -> int:
    for _ in range(hops):
        earlier = [p for p in range(place) if symbols[p] == symbols[place]]
        if not earlier:
            return NONE
        place = earlier[-1] + 1
    return ANSWERS + symbols[place] - SYMBOLS


@pytest.mark.parametrize("task", [Hops(), Hops((1, 2, 5), alphabet=7, length=30), Hops((9,), 3, 60)], ids=str)
def test_hops(task: Hops) -> None:
    ids = task.documents(numpy.random.default_rng(0), 300)
    assert ids.shape == (300, task.seq_length) and set(ids[:, 1].tolist()) == set(task.levels)
    for row in ids.tolist():
        symbols, hops = row[::2], row[1]
        assert set(symbols) <= set(range(SYMBOLS, SYMBOLS + task.alphabet))
        assert all(one != other for one, other in zip(symbols, symbols[1:], strict=False))
        assert row[3::2] == [hop_answer(symbols, place, hops) for place in range(1, task.length)]
    answers = ids[:, 3::2]
    assert len(set(answers[answers != NONE].tolist())) == task.alphabet


@pytest.mark.parametrize("task", [Addition(), Addition((2,), digits=1), Addition((31, 3), digits=15)], ids=str)
def test_addition(task: Addition) -> None:
    ids = task.documents(numpy.random.default_rng(0), 300)
    assert ids.shape == (300, task.seq_length) and set(ids[:, 0].tolist()) == set(task.levels)
    for level, *row in ids.tolist():
        end = row.index(EQUALS)
        numbers: list[list[int]] = [[]]
        for token in row[:end]:
            if token == PLUS:
                numbers.append([])
            else:
                numbers[-1].append(token - SYMBOLS)
        assert len(numbers) == level and {len(number) for number in numbers} == {task.digits}
        total = sum(int("".join(map(str, reversed(number)))) for number in numbers)
        answer, rest = row[end + 1 :][: task.answer_digits], row[end + 1 :][task.answer_digits :]
        assert int("".join(str(token - ANSWERS) for token in reversed(answer))) == total
        assert set(rest) <= {FILLER}


def test_a_seed_makes_the_same_bytes_and_nothing_is_overwritten(tmp_path: Path) -> None:
    task = Hops((1, 3), 3, 6)

    def files(folder: str, *seed: int) -> dict[str, bytes]:
        assert write_task(task, tmp_path / folder / "train", 5000, (seed[0], seed[1]))
        return {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}

    first = files("a", 1, 0)
    assert set(first) == {"train.bin", "train.idx", "train.idx.json"} and first == files("b", 1, 0)
    assert all(files(name, *seed)["train.bin"] != first["train.bin"] for name, seed in (("c", (1, 1)), ("d", (2, 0))))
    assert write_task(task, tmp_path / "a" / "train", 5000, (1, 0)) is False
    with pytest.raises(UserError, match="choose another --output"):
        write_task(task, tmp_path / "a" / "train", 4999, (1, 0))
    name, ids = read_task(str(tmp_path / "a" / "train"))
    assert name == "hops" and ids.shape == (5000, 12) and ids.max() < VOCAB_SIZE - 1
    (tmp_path / "a" / "train.idx.json").unlink()
    with pytest.raises(UserError, match="no task"):
        read_task(str(tmp_path / "a" / "train"))


def test_held_out_documents_are_not_those_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as there are others: of a level that training has whole, they stay, and the command says so."""
    task, valid = Addition((2, 3), digits=1), tmp_path / "valid"
    write_task(task, tmp_path / "train", 1000, (1, 0))
    write_task(task, tmp_path / "plain", 5000, (1, 1))
    assert write_task(task, valid, 5000, (1, 1), tmp_path / "train")
    assert write_task(task, valid, 5000, (1, 1), tmp_path / "train") is False
    train, plain, ids = (read_task(str(tmp_path / name))[1].tolist() for name in ("train", "plain", "valid"))
    known = {tuple(row) for row in train}
    shared = [tuple(row) in known for row in plain]
    assert 0.2 < sum(shared) / 5000 < 1
    for before, after, drawn_again in zip(plain, ids, shared, strict=True):
        assert before[0] == after[0] and (before == after) is not (drawn_again and tuple(after) not in known)
        assert tuple(after) not in known or after[0] == 2
    assert share_in(valid, tmp_path / "train") == sum(tuple(row) in known for row in ids) / 5000 < sum(shared) / 5000
    few = ["--digits", "1", "--summands", "2", "--train-documents", "5000", "--valid-documents", "50"]
    for words, said in ([few, "100.0% of the documents to evaluate on"], [["--train-documents", "99"], ""]):
        main(["task", "addition", *words, "--output", str(tmp_path / words[0] / str(len(words)))])
        assert ("among those to train on" in (out := capsys.readouterr().out)) == bool(said) and said in out


def test_mistakes_name_their_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in {
        "hops --hops 1 32": "--hops must lie between 1 and 31, but is 32.",
        "hops --alphabet 2": "--alphabet must lie between 3 and 31, but is 2.",
        "hops --length 1": "--length must lie between 2 and",
        "addition --summands 1": "--summands must lie between 2 and 31, but is 1.",
        "addition --digits 16": "--digits must lie between 1 and 15, but is 16.",
        "addition --train-documents 1": "--train-documents must be at least 2",
    }.items():
        with pytest.raises(SystemExit):
            main(["task", *words.split(), "--output", str(tmp_path / "a")])
        assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
