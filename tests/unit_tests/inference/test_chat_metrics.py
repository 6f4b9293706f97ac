"""chat-metrics: the loss of the assistant's tokens, its answers against the true ones, of files and prepared data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.commands import main, parser_of
from megatron_recursive.commands.chat_metrics import run
from megatron_recursive.data.indexed import write_index
from megatron_recursive.errors import UserError
from megatron_recursive.inference.chat_metrics import distinct, read_samples, turns_of
from megatron_recursive.inference.loading import Loaded, open_model
from megatron_recursive.inference.text import NumberText
from tests.unit_tests.inference.folders import write_plain, write_recursive

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
CHATS = [[("user", "hi"), ("assistant", "you there"), ("user", "so"), ("assistant", "ok")],
         [("user", "a"), ("assistant", "b b")], [("user", "x" * 50), ("assistant", "too long")]]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recursive(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def measured(folder: Path, data: Path, output: Path, *flags: Any) -> dict[str, Any]:
    words = ["--model", folder, "--data", data, "--output", output, "--max-tokens", 6, *flags]
    run(parser_of("chat-metrics").parse_args([str(each) for each in words]))
    record: dict[str, Any] = json.loads(output.read_text())
    return record


def write_prepared(prefix: Path, samples: list[tuple[list[int], bytes]]) -> None:
    for suffix, kind, which in (("", "u2", 0), ("_supervised", "u1", 1)):
        rows = [torch.tensor([*sample[which]]).numpy().astype(kind) for sample in samples]
        Path(f"{prefix}{suffix}.bin").write_bytes(b"".join(row.tobytes() for row in rows))
        lengths = torch.tensor([len(row) for row in rows]).numpy().astype("i4")
        write_index(Path(f"{prefix}{suffix}.idx"), kind, lambda lengths=lengths: [lengths])


def test_of_a_file_and_of_prepared_data(folder: Path, chats: Path, tmp_path: Path, capsys: Any) -> None:
    record = measured(folder, chats, tmp_path / "file.json", "--num-refinement-blocks", 2)
    assert (record["conversations"], record["left_out"], record["depth"]) == (2, 1, 2)
    samples, losses, right, said = [], [], [], []
    with open_model(str(folder), num_refinement_blocks=2) as loaded, torch.no_grad():
        for chat in CHATS:
            ids, mask = list[int](), b""
            for role, text in chat:
                head, words = loaded.text.encode(f"<{role[0]}>"), [*loaded.text.encode(text), 0]
                if role == "assistant" and len(chat[0][1]) < 50:
                    prompt = torch.tensor([ids + head])
                    new = loaded.model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
                    said.append(loaded.text.decode(new[: [*new.tolist(), 0].index(0)].tolist()).strip())
                ids += head + words
                mask += bytes(len(head)) + bytes([role == "assistant"]) * len(words)
            samples.append((ids, mask))
            if len(ids) <= 48:
                logits = loaded.model(torch.tensor([ids])).logits[0, :-1]
                places = [at for at in range(len(ids) - 1) if mask[at + 1]]
                losses += [float(-logits[at].log_softmax(-1)[ids[at + 1]]) for at in places]
                right += [int(logits[at].argmax()) == ids[at + 1] for at in places]
    assert record["tokens"] == len(losses) == 10 + 3 + 4
    assert record["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert record["perplexity"] == pytest.approx(torch.tensor(record["loss"]).exp().item(), rel=1e-5)
    assert record["accuracy"] == sum(right) / len(right)
    true = ["you there", "ok", "b b"]
    assert record["turns"] == 3
    assert [(each["true"], each["said"]) for each in record["answers"]] == [*zip(true, said, strict=True)]
    assert record["true_distinct_1"] == 0.8 and record["true_distinct_2"] == 1.0 and record["exact_match"] == 0
    write_prepared(tmp_path / "data", samples)
    prepared = measured(folder, tmp_path / "data", tmp_path / "prepared.json", "--num-refinement-blocks", 2)
    assert prepared | {"data": 0} == record | {"data": 0}
    trained = {"chat_data": str(tmp_path / "data"), "split": "1,1,1"}
    held_out = [*read_samples(Loaded("m", None, NumberText(9), None, recursive=True, trained=trained),
                              str(tmp_path / "data"))]  # fmt: skip
    assert held_out == [(samples[1][0], samples[1][1])]
    assert "perplexity" in capsys.readouterr().out


def test_an_exit_and_json(folder: Path, chats: Path, tmp_path: Path, capsys: Any) -> None:
    record = measured(folder, chats, tmp_path / "x.json", "--exit", "halting", "--json", "--num-samples", 1)
    assert json.loads(capsys.readouterr().out) == record
    assert record["conversations"] == 1 and 1 <= record["mean_blocks"] <= 3 and record["exit"] == "halting"


def test_what_the_answers_are_measured_by() -> None:
    assert distinct(["a b a", "b a"], 1) == 0.4 and distinct(["a b a", "b a"], 2) == 2 / 3
    assert distinct(["a", ""], 2) is None, "of no pair of words there is no share"
    ids, mask = [*range(10)], bytes([0, 1, 1, 0, 0, 1, 1, 0, 1, 1])  # the first answer has lost its prompt
    assert turns_of([(ids, mask)], [6]) == [([0, 1, 2, 3, 4], [5]), ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])]


def test_refusals(folder: Path, chats: Path, tmp_path: Path, capsys: Any) -> None:
    plain = write_plain(tmp_path / "plain")
    long = tmp_path / "long.jsonl"
    long.write_text(chats.read_text().splitlines()[2])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user"}]}\n')
    write_prepared(tmp_path / "data", [([1, 2, 999], b"\0\0\1")])
    write_prepared(tmp_path / "half", [([1, 2, 3], b"\0\0\1")])
    Path(tmp_path / "half_supervised.idx").unlink()
    for model, data, sentence in ((plain, chats, "chat template, which the model's tokenizer has not"),
                                  (folder, long, "no conversation that fits"), (folder, bad, "bad.jsonl:1"),
                                  (folder, tmp_path / "data", "the token id 999"),
                                  (folder, tmp_path / "half", "half_supervised"),
                                  (folder, tmp_path / "none.jsonl", "--data .*none.jsonl does not exist")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            measured(model, data, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(SystemExit):
        main(["chat-metrics", "--model", str(folder), "--data", str(chats), "--batch-size", "0"])
    assert "--batch-size must be at least 1" in capsys.readouterr().err
