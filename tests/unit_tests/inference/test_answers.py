"""Right answers by level, block and exit, held against the model's own outputs, document by document."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.commands import main
from megatron_recursive.data.tasks import ANSWERS, Addition, Hops, read_task, write_task
from megatron_recursive.inference import answers
from megatron_recursive.inference.generation import Settings
from megatron_recursive.inference.text import NumberText
from tests.unit_tests.inference.folders import write_plain, write_recursive

DOCUMENTS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recursive model and a plain one, both without a tokenizer; and tasks."""
    folder = tmp_path_factory.mktemp("answers")
    for model in (write_recursive(folder / "recursive"), write_plain(folder / "plain")):
        for file in model.glob("*token*"):
            file.unlink()
    write_task(Hops((1, 3), length=20), folder / "hops", DOCUMENTS, (1, 1))
    write_task(Addition((2, 5)), folder / "sums", DOCUMENTS, (1, 1))
    write_task(Hops(length=30), folder / "long", DOCUMENTS, (1, 1))
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    with contextlib.suppress(SystemExit):
        main(["task", "evaluate", *words])
    return capsys.readouterr()


def by_hand(folder: Path, task: str, level_place: int, **options: Any) -> dict[Any, list[Any]]:
    """Level to (right after each block, right at the exit, blocks taken) of every answer."""
    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

    model = RecursiveGPTForCausalLM.from_pretrained(folder / "recursive").eval()
    found: dict[Any, list[Any]] = defaultdict(list)
    for ids in read_task(str(folder / task))[1].tolist():
        read = torch.tensor([[0 if token >= ANSWERS else token for token in ids]])
        with torch.no_grad():
            full = model(read, output_blocks=True).block_logits[:, 0].argmax(-1).tolist()
            left = model(read, **options)
        for place, token in enumerate(ids):
            if token >= ANSWERS:
                at_exit = int(left.logits[0, place - 1].argmax())
                right = [block[place - 1] == token for block in full]
                found[ids[level_place]].append((right, at_exit == token, int(left.blocks[0, place - 1])))
    return found


@pytest.mark.parametrize(("task", "level_place"), [("hops", 1), ("sums", 0)])
def test_counts(
    folder: Path, task: str, level_place: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_BATCH", 7)
    words = ["--model", str(folder / "recursive"), "--data", str(folder / task)]
    out, _ = said(capsys, *words, "--json", "--halt-threshold", "0.4")
    result = json.loads(out)
    assert result["exit"] == "halting"
    expected = by_hand(folder, task, level_place, exit="halting", halt_threshold=0.4)
    levels = sorted(expected)
    expected[None] = [answer for level in levels for answer in expected[level]]
    assert [row["level"] for row in result["rows"]] == [*levels, None] and len(levels) == 2
    for row in result["rows"]:
        rights, at_exit, blocks = zip(*expected[row["level"]], strict=True)
        count = len(blocks)
        assert row["answers"] == count
        assert row["accuracy"] == pytest.approx([sum(block) / count for block in zip(*rights, strict=True)])
        assert row["exit accuracy"] == pytest.approx(sum(at_exit) / count)
        assert row["exit block"] == pytest.approx(sum(blocks) / count) and 1 < row["exit block"] < 3


def test_other_models_exits_and_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, recursive = ["--model", str(folder / "plain")], ["--model", str(folder / "recursive")]
    data = ["--data", str(folder / "hops")]
    out, _ = said(capsys, *plain, *data)
    assert out.splitlines()[0].split() == ["hops", "answers", "block", "1", "whole"] and len(out.splitlines()) == 4
    out, _ = said(capsys, *recursive, *data, "--num-refinement-blocks", "4", "--exit", "argmax")
    assert "block 4" in out and "mean exit block" in out and f" {DOCUMENTS * 19} " in out.splitlines()[-1]
    assert "exit" not in said(capsys, *recursive, *data, "--exit", "none")[0]
    for words, sentence in (
        ([*plain, *data, "--exit", "kl"], "is a plain one"),
        ([*recursive, "--data", str(folder / "long")], "has documents of 60 tokens"),
        ([*recursive, "--data", str(folder / "absent")], "absent.bin does not exist"),
        ([*recursive, *data, "--exit", "none", "--halt-threshold", "0.4"], "belongs to an exit"),
    ):
        out, err = said(capsys, *words)
        assert out == "" and sentence in err and err.count("\n") == 1


def test_whole_documents(folder: Path) -> None:
    """A model that knows all answers but one of the last document."""
    documents = torch.from_numpy(read_task(str(folder / "sums"))[1].astype("int64"))
    knows = torch.nn.functional.one_hot(documents[:, 1:], 128).float()
    asked = (documents[-1, 1:] >= ANSWERS).nonzero()[-1]
    knows[-1, asked] = 0.0

    class Knowing:
        device, config = torch.device("cpu"), argparse.Namespace(vocab_size=128)

        def __call__(self, _: torch.Tensor) -> argparse.Namespace:
            return argparse.Namespace(logits=knows)

    loaded = answers.Loaded("", Knowing(), NumberText(128), None, recursive=False)
    rows = answers.evaluate(loaded, str(folder / "sums"), Settings())[1]
    right, levels = torch.ones(DOCUMENTS), documents[:, 0]
    right[-1] = 0.0
    expected = {level: right[levels == level].mean().item() for level in levels.unique().tolist()}
    assert {row["level"]: row["whole"] for row in rows} == pytest.approx(expected | {None: 11 / 12})
