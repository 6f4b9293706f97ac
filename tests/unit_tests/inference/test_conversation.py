"""generate --interactive: turns, commands, the window of whole turns, and where an answer ends."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.commands import parser_of
from megatron_recursive.errors import UserError
from megatron_recursive.inference import command
from megatron_recursive.inference.conversation import Conversation
from megatron_recursive.inference.generation import Settings, generate
from megatron_recursive.inference.loading import open_model
from tests.unit_tests.inference.folders import POSITIONS, TEMPLATE, write_plain, write_recursive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recursive(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers, and what is said beside them."""

    def talk(folder: Path, lines: str, *flags: Any) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        words = ["--model", folder, "--interactive", "--max-tokens", 4, *flags]
        capsys.readouterr()
        command.run(parser_of("generate").parse_args([str(each) for each in words]))
        heard = capsys.readouterr()
        return heard.out.splitlines(), heard.err

    return talk


def greedy(folder: Path, text: str, blocks: int = 3) -> list[int]:
    """Token ids of the answer to a prompt."""
    with open_model(str(folder), num_refinement_blocks=blocks) as loaded:
        ids = loaded.text.encode(text)
        tokens: list[int] = loaded.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist()
        return tokens[len(ids) :]


def test_commands(folder: Path, tmp_path: Path, talk: Any) -> None:
    (tmp_path / "other").write_text("of somebody")
    file, other, blank = (tmp_path / name for name in ("chat.jsonl", "other", "of a day.jsonl"))
    lines = [f"/save {file}", "hi", f"/save {file}", "", "yo", f"/save {file}", f'/save "{blank}"', "/reset",
             "/depth 1", "hi", "/temp 0.7", "/temp", "/temp -1", f"/save {other}", "/depth x", "/depth 0", "/nope",
             "/etc/x y", "/quit", "never"]  # fmt: skip
    said, beside = talk(folder, "\n".join(lines), "--system", "s")
    with open_model(str(folder)) as loaded:
        answers = [loaded.text.decode(greedy(folder, "<system>s<user>hi<assistant>", blocks)) for blocks in (3, 1)]
    assert len(said) == 4 and [said[0], said[2]] == answers and answers[0] != answers[1]
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert blank.read_bytes() == file.read_bytes()
    roles, contents = zip(*((each["role"], each["content"]) for each in json.loads(line)["messages"]), strict=True)
    assert roles == ("system", *("user", "assistant") * 2) and contents == ("s", "hi", said[0], "yo", said[1])
    assert other.read_text() == "of somebody" and f"{other} exists already; name another file." in beside
    for sentence in ("Nothing was said yet", "The conversation starts over.", "Depth 1.", "Temperature 0.7.",
                     "/temp is no command",
                     "/temp -1 is no command", "/depth x is no command", "/depth must be at least 1, but is 0.",
                     "/nope is no command; there are /reset, /temp X"):  # fmt: skip
        assert sentence in beside
    assert beside.count("tokens, ") == 4  # a path is no command


def test_the_window_slides_by_whole_turns(folder: Path, talk: Any) -> None:
    lines = "abcdefgh\nabcdefgh\n" + "x" * 14 + "\n"
    said, beside = talk(folder, lines, "--system", "s")
    assert len(said) == 3 and "note: of 3 turns the first 2 no longer fit beside an answer into the 48 pos" in beside
    with open_model(str(folder)) as loaded:
        talked = Conversation(loaded, Settings(max_tokens=4), argparse.Namespace(system=None))
        turns = [{"role": role, "content": 3 * role[0]} for _ in range(3) for role in ("user", "assistant")][:-1]
        assert loaded.text.decode(talked._window(turns)) == "<user>uuu<assistant>aaa<user>uuu<assistant>"
        talked.opening = [{"role": "system", "content": "s"}]
        assert loaded.text.decode(talked._window(talked.opening + turns)) == "<system>s<user>uuu<assistant>"
        talked.settings = Settings(max_tokens=10 * POSITIONS)  # an answer takes at most half of the positions
        assert loaded.text.decode(talked._window(talked.opening + turns[-1:])) == "<system>s<user>uuu<assistant>"


def test_an_answer_stops_at_the_end_of_its_turn(folder: Path, tmp_path: Path, talk: Any) -> None:
    """A token that the template alone tells of: the third of the answer takes its place in the vocabulary."""
    with open_model(str(folder)) as loaded:
        prompt = loaded.text.encode("<user>hi<assistant>")
        (answer,) = generate(loaded, [prompt], Settings(max_tokens=4, temperature=2.0))
    tokens = answer.tokens
    assert tokens[2] not in tokens[:2]
    ends = TEMPLATE.replace("}}{% endfor", "}}{% if m.role == 'assistant' %}<|turn|>{% endif %}{% endfor")
    other = write_recursive(tmp_path / "other", ends)
    file = json.loads((other / "tokenizer.json").read_text())
    (name,) = (name for name, number in file["model"]["vocab"].items() if number == tokens[2])
    file["model"]["vocab"]["<|turn|>"] = file["model"]["vocab"].pop(name)
    file["added_tokens"].append({**file["added_tokens"][0], "content": "<|turn|>", "id": tokens[2], "special": False})
    (other / "tokenizer.json").write_text(json.dumps(file))
    said, beside = talk(other, "hi\n", "--temperature", 2)
    with open_model(str(other)) as loaded:
        assert loaded.text.turn_end_ids == [tokens[2]] and said == [loaded.text.decode(tokens[:2])]
    assert "ended by itself" in beside


def test_without_template_or_blocks(tmp_path: Path, talk: Any) -> None:
    folder = write_plain(tmp_path)
    said, beside = talk(folder, "ab\n/depth 2\ncd\n")
    assert len(said) == 2 and "no chat template: what you type is continued as plain text" in beside
    assert "/depth needs a recursive model" in beside
    with open_model(str(folder)) as loaded:
        first = loaded.text.encode("ab") + loaded.model.generate(
            torch.tensor([loaded.text.encode("ab")]), max_new_tokens=4, do_sample=False)[0, 2:].tolist()
        text = loaded.text.decode(first) + "\ncd"
        expected = loaded.model.generate(torch.tensor([loaded.text.encode(text)]), max_new_tokens=4, do_sample=False)
        assert said[1] == loaded.text.decode(expected[0].tolist())[len(text) :]
    with pytest.raises(UserError, match="--system needs a chat template"):
        talk(folder, "", "--system", "s")
