"""The report: whose records are told, the rules of its answers, and one file that asks for no other."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.report.answers import answers
from megatron_recursive.report.page import render
from megatron_recursive.report.subjects import Subject, find_subjects
from tests.unit_tests.plots.records import start, train, valid, write

FLOPS = {"training": 30.0, "plain_training": 10.0, "inference": 8e9, "plain_inference": 4e9}
COUNT = {"model": {"sequence_length": 8192}, "flops_per_token": FLOPS, "cache_bytes_per_token": 4096,
         "parameters": {"held": {"total": 1234567}}}  # fmt: skip


def swept(model: str, *losses: float, exits: Any = None, **more: Any) -> dict[str, Any]:
    """Loss at depth 1, 2, ...; trained at 2."""
    depths = [{"depth": n, "loss": loss, "accuracy": 0.1 * n, "flops_per_token": 100.0 * n, **more}
              for n, loss in enumerate(losses, start=1)]  # fmt: skip
    return {"model": model, "trained_depth": 2, "tokens": 2048, "depths": depths, "exits": exits or {}, "text": "any"}


def save(file: Path, kind: str, record: dict[str, Any], at: float = 1000.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"format": f"megatron-recursive {kind}", "version": 1, "text": "CPython", **record}))
    os.utime(file, (at, at))
    return file


def said(**found: Any) -> list[tuple[str, str, str]]:
    about = {name: found.pop(name) for name in ("plan", "figures") if name in found}
    subject = Subject("m", Path("m"), "m", "m", **about, found=found)
    return [(each.said, each.tone, " ".join(each.lines)) for each in answers(subject)]


def health(loss: float, reset: float, **more: Any) -> dict[str, Any]:
    return {"loss": loss, "reset": [{"remaining": 1, "loss": reset, **more}]}


@pytest.mark.parametrize(("found", "used", "bought"), [
    ({"sweep": swept("m", 3.0, 2.9), "health": health(2.9, 2.95)}, ("Yes", "good"), "0.100 nats a token"),
    ({"sweep": swept("m", 3.0, 2.9), "health": health(2.9, 2.9015)}, ("No", "bad"), "0.100 nats a token"),
    ({"sweep": swept("m", 2.9, 3.0), "health": health(3.0, 3.1)}, ("It does harm", "bad"),
     "It costs 0.100 nats a token"),
    ({"sweep": swept("m", 2.9, 2.8985)}, ("No", "bad"), "Nothing"),
    ({"sweep": swept("m", 3.0, 2.9) | {"trained_depth": 1}}, ("Not measured", "open"), "Not measured"),
    ({"health": health(2.9, 2.89)}, ("It does harm", "bad"), "Not measured"),
    ({"figures": {"blocks": [3.0, 2.5], "alarms": [], "iteration": 9}, "plan": "2 blocks"}, ("Yes", "good"),
     "0.500 nats a token"),
    ({"figures": {"depths": {"1": 3.0, "8": 2.9}, "held out": 2.5, "iteration": 9}, "plan": "2 blocks"},
     ("Yes", "good"), "0.500 nats a token"),  # --eval-depths without the model's own
    ({"figures": {"blocks": [3.0, 3.0], "iteration": 9}}, ("No", "bad"), "Nothing"),
    ({"sweep": swept("m", 3.0, 2.991, standard_error=0.005)}, ("Within the noise", "open"), "Within the noise"),
    ({"sweep": swept("m", 3.0, 2.989, standard_error=0.005)}, ("Yes", "good"), "0.011 nats a token"),
    ({"sweep": swept("m", 3.0, 2.9995, standard_error=0.0005)}, ("No", "bad"), "Nothing"),
    ({"sweep": swept("m", 3.0, 2.9), "health": health(2.9, 2.895, standard_error=0.005)}, ("Within the noise", "open"),
     "0.100 nats a token"),
    ({"sweep": swept("m", 2.9, 3.0), "health": health(3.0, 3.001, standard_error=0.005)}, ("It does harm", "bad"),
     "It costs 0.100 nats a token"),
    ({}, ("Not measured", "open"), "Not measured"),
    ({"plan": RecursionPlan.plain()}, ("There is none", "open"), "There is none"),
])  # fmt: skip
def test_each_answer_follows_its_rule(found: dict[str, Any], used: tuple[str, str], bought: str) -> None:
    if found.get("plan") == "2 blocks":
        found = {**found, "plan": RecursionPlan.from_json(start(blocks=2)["plan"])}
    first, second, _ = said(**found)
    assert (first[:2], second[0]) == (used, bought)


def test_what_stands_under_the_answers() -> None:
    costs = {190.0: 2.905, 150.0: 2.909, 100.0: 3.0}
    points = [{"flops_per_token": flops, "loss": loss} for flops, loss in costs.items()]
    alarms = ["ALARM at iteration 7: the state is ignored: try another --lr"]
    found = {"sweep": swept("m", 3.0, 2.9, 2.95, exits={"kl": {"points": points}}), "health": health(2.9, 2.95)}
    use, gain, cost = said(**found, count=COUNT, figures={"alarms": alarms, "iteration": 9})
    assert "Stopping at depth 1, not 2, raises the loss by 0.100 nats a token." in use[2]
    assert "Resetting the state before the last step raises the loss by 0.050" in use[2]
    core = RecursionPlan.from_json(start(blocks=2)["plan"])  # whose last block, reset, is a model of one
    assert "Resetting" not in said(**found, plan=core, figures={})[0][2]
    assert use[2].endswith("an alarm at iteration 7 of 9.")
    assert "perplexity 20.09 to 18.17." in gain[2] and "right: 10.0% to 20.0%" in gain[2]
    assert "Deeper than trained does not help: 2.950 at depth 3." in gain[2]
    assert cost[0] == "2.00 times the FLOPs" and "8.0B FLOPs" in cost[2] and "3.00 times" in cost[2]
    assert "Leaving early (kl) would save 25% of a new token for +0.009 nats." in cost[2]
    noisy = said(sweep=swept("m", 3.0, 2.9, 2.897, standard_error=0.005))
    assert "not 2, raises the loss by 0.100 nats a token (standard error 0.0050)." in noisy[0][2]
    assert "The best depth" not in noisy[1][2] and "Deeper than trained does not help" in noisy[1][2]
    assert "The best depth is 3: 2.800." in said(sweep=swept("m", 3.0, 2.9, 2.8))[1][2]


def test_records_are_told_of_the_model_that_they_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        mark = tmp_path / name / "checkpoints" / "latest_checkpointed_iteration.txt"
        (mark.parent / "iter_0000003").mkdir(parents=True)
        mark.write_text("3")
        os.utime(mark, (500, 500))
    both = [swept("a/checkpoints", 3.0, 2.5), swept(f"{tmp_path}/b/checkpoints/iter_0000003", 3.0, 2.0)]
    for part in ("a/best", "a/exported"):  # of --keep-best, and an export
        (tmp_path / part).mkdir()
        both += [swept(part, 3.0, 1.0)]
    save(tmp_path / "runs" / "sweep.json", "sweep", {"models": both})
    save(tmp_path / "runs" / "layers.json", "layers", {"model": "elsewhere", "layers": []})
    save(tmp_path / "a" / "one.json", "health", {"model": "gone/since", "loss": 1.0}, at=900)
    save(tmp_path / "a" / "two.json", "health", {"model": "a/checkpoints", "loss": 2.0}, at=901)
    save(tmp_path / "a" / "three.json", "health", {"model": "b/checkpoints", "loss": 3.0}, at=902)
    save(tmp_path / "a" / "four.json", "health", {"model": "org/of-the-hub", "loss": 5.0}, at=903)
    save(tmp_path / "a" / "five.json", "health", {"model": "a/best", "loss": 6.0}, at=904)
    save(tmp_path / "b" / "old.json", "health", {"model": "b/checkpoints", "loss": 4.0}, at=499)
    (tmp_path / "b" / "samples.jsonl").write_text('{"step": 1, "blocks": []}\n{"prompt": "x"}\n')
    (tmp_path / "b" / "corpus.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "b" / "other.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "b" / "config_of_something.json").write_text('{"format": 3}')
    scores = {"results": {"t": {"acc,none": 0.5}}, "config": {"model": "hf"}}
    save(tmp_path / "a" / "scores" / "m" / "results_1.json", "evaluate", scores)
    of_best = {"results": {"t": {"acc,none": 0.9}}, "config": {"model": "hf", "model_args": {"pretrained": "a/best"}}}
    save(tmp_path / "a" / "best" / "eval" / "results_2.json", "evaluate", of_best, at=1001)
    (a, b), _ = find_subjects(["a", "b/checkpoints"])
    assert a.model == "a/checkpoints" and b.model == "b/checkpoints" and b.name == "b"
    assert a.found["sweep"]["depths"][1]["loss"] == 2.5 and b.found["sweep"]["depths"][1]["loss"] == 2.0
    assert a.found["health"]["loss"] == 2.0, "the newest, not one of another model in its folder"
    assert set(a.found) == {"sweep", "health", "scores"} and a.found["scores"][0]["results"]["t"]["acc,none"] == 0.5
    assert set(b.found) == {"sweep", "samples"}, "not a record that is older than the weights"
    (tmp_path / "a" / "torn.json").write_text("{")
    for given, sentence in (["a"], "cannot read a/torn.json as JSON"), (["runs"], "runs is neither a run nor a model"):
        with pytest.raises(UserError, match=sentence):
            find_subjects(given)


class Page(HTMLParser):
    """Tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_of_two_runs_asks_for_nothing_and_says_what_is_not_there(tmp_path: Path) -> None:
    for name, blocks, losses in (("<b>&deep", 2, (4.0, 3.5)), ("plain", 0, (3.9,))):
        write(tmp_path / name / "metrics.jsonl", start(blocks=blocks, flops=2e6 if blocks else 1e6),
              *(train(n, 9.0 / n) for n in range(1, 4)), valid(4, *losses, tokens=256))  # fmt: skip
    subjects, compared = find_subjects([str(tmp_path / "<b>&deep"), str(tmp_path / "plain")])
    text = render(subjects, compared, {"sweep of plain": "megatron-recursive sweep --model 'a <b>'"})
    page = Page(text)
    assert not page.all("b") and not page.all("script") and "http:" not in text and "https:" not in text
    assert all(re.match("data:", each["href"] or "") for each in page.all("link"))
    pictures = page.all("img")
    assert len(pictures) == 4 and all(each["src"].startswith("data:image/png;base64,iVBOR") and each["alt"]
                                      for each in pictures)  # fmt: skip
    words = " ".join(page.texts)
    assert words.index("Is the recursion used?") < words.index("There is none") < words.index("At the same 256 tokens")
    assert "<b>&deep has 3.500 and plain has 3.900: the recursion buys 0.400 nats at 2 times the FLOPs" in words
    assert "sweep of plain: megatron-recursive sweep --model 'a <b>'" in " ".join(words.split())
    assert [each["scope"] for each in page.all("th")] == ["col"] * 2
