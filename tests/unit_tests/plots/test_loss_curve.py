import json
import re

import pytest

from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from megatron_recursive.plots.loss_curve import Drawn, plot_loss_curve, plot_score_by_flops
from megatron_recursive.plots.runs import read_runs
from tests.unit_tests.plots.records import start, train, valid, write


def run_of(blocks):
    """With a halting loss and changes of the state where there are blocks."""
    yield start(blocks=blocks)
    for iteration in range(10, 60, 10):
        loss, halt = 9 - iteration / 10, {"halt loss": 0.7, "total loss": 9.5} if blocks else {}
        changes = {f"output change block {b}": 1 / b for b in range(1, blocks + 1)}
        yield train(iteration, loss, **halt)
        yield valid(iteration, *(loss + 0.1 * b for b in range(blocks, 0, -1)), loss, **changes, note="ignored")


def texts_of(picture):
    """All that is written in an .svg."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text())


@pytest.fixture(autouse=True)
def written_as_text(monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


@pytest.mark.parametrize("blocks", [0, 1, 12])
def test_a_picture_is_drawn_beside_the_metrics(tmp_path, blocks):
    metrics = write(tmp_path / "metrics.jsonl", *run_of(blocks))
    assert plot_loss_curve([metrics]) == tmp_path / "metrics.png"
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.png"]


def test_several_runs_share_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, blocks in (("default", 3), ("plain", 0)):
        write(tmp_path / name / "checkpoints/metrics.jsonl", *run_of(blocks))
    assert str(plot_loss_curve(["default", "plain"])) == "comparison.png"
    texts = texts_of(plot_loss_curve(["default", "plain"], tmp_path / "new/two.svg"))
    assert {"default (held-out lm loss 4.000)", "plain (held-out lm loss 4.000)", "thousand tokens"} <= {*texts}
    # Single values, means and evaluations are told apart; the halting loss has a panel of its own.
    assert {"training, one logged iteration", "training, mean of 3 logged iterations"} <= {*texts}
    assert {"held-out, one evaluation", "language-model loss", "halting loss", "block 1", "block 4"} <= {*texts}
    assert "iteration" in texts_of(plot_loss_curve(["default", "plain"], tmp_path / "x.svg", "iteration"))
    learned = [train(i, 3.0, **{"lm loss block 1": 4.0, "lm loss block 2": 3.0}) for i in (1, 2)]
    file = write(tmp_path / "learned.jsonl", *learned)  # of a run that evaluates nothing
    assert "training loss after each block" in texts_of(plot_loss_curve([file], tmp_path / "x.svg"))
    depths = {"lm loss depth 1": 6.0, "lm loss depth 16": 4.0}
    file = write(tmp_path / "deep.jsonl", *run_of(2), valid(60, 5.0, 4.5, **depths))
    texts = texts_of(plot_loss_curve([file], tmp_path / "x.svg"))
    assert {"held-out loss at each depth", "depth 1", "depth 16"} <= {*texts}
    assert "training FLOPs (1e9)" in texts_of(plot_loss_curve(["plain"], tmp_path / "x.svg", "flops"))
    with pytest.raises(UserError, match="--x seconds: .* does not tell it; choose one of iteration, tokens, flops"):
        plot_loss_curve(["default", "plain"], x="seconds")


def test_what_is_no_number_is_a_gap(tmp_path):
    file = write(tmp_path / "m.jsonl", train(10, 5.0), train(20, float("inf")), valid(20, 4.5))
    file.write_text(file.read_text() + '{"iteration": 40, "ki')  # still being written
    drawn = Drawn(read_runs([file])[0], "C0", "o", "iteration", 1.0)
    x, y = drawn.points("train", "lm loss")
    assert x == [10, 20] and y[0] == 5.0 and y[1] != y[1]
    assert drawn.points("held-out", "lm loss") == ([20], [4.5])
    assert plot_loss_curve([file], tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{\n", ":2 is not valid JSON"),
        ("[]\n", ":2 is not a JSON object"),
        (json.dumps({"kind": "best", "iteration": 1}) + "\n", ":2 has the kind 'best'"),
        (json.dumps({"kind": "train", "iteration": "1"}) + "\n", ":2 has the iteration '1'"),
        (json.dumps(train(1, "low")) + "\n", ":2 has 'low' under 'lm loss'"),
        (json.dumps(train(1, 1.0, time="now")) + "\n", ":2 has 'now' under 'time'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, said):
    file = write(tmp_path / "m.jsonl", train(1, 1.0))
    file.write_text(file.read_text() + text)
    with pytest.raises(UserError) as caught:
        plot_loss_curve([file])
    assert f"{file}{said}" in str(caught.value)


def test_missing_empty_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl .No such file"):
        plot_loss_curve([tmp_path / "none.jsonl"])
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="holds no losses"):
        plot_loss_curve([empty])
    metrics = write(tmp_path / "m.jsonl", *run_of(1))
    with pytest.raises(UserError, match="cannot write .*empty.jsonl/a.png"):
        plot_loss_curve([metrics], empty / "a.png")
    with pytest.raises(UserError, match="--output .* end it with one of .png, .pdf, .svg"):
        plot_loss_curve([metrics], tmp_path / "a.doc")


def test_a_score_lies_over_the_flops_that_drawn_depths_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grown = [valid(10, 5.0, FLOPs=2e9, accuracy=0.25), valid(20, 4.0, FLOPs=8e9, accuracy=0.5)]  # a curriculum
    write(tmp_path / "grown/metrics.jsonl", start(), train(10, 5.0, FLOPs=2e9), *grown)
    write(tmp_path / "plain/metrics.jsonl", start(blocks=0), train(10, 5.5), valid(10, 5.5, accuracy=0.125))
    main(["plot", "flops", "grown", "plain", "--score", "accuracy", "--output", "f.svg"])
    assert {"training FLOPs (1e9)", "held-out accuracy", "grown", "plain"} <= {*texts_of(tmp_path / "f.svg")}
    drawn = Drawn(read_runs(["grown"])[0], "C0", "o", "flops", 1e9)
    assert drawn.points("held-out", "accuracy") == ([2, 8], [0.25, 0.5])
    main(["plot", "flops", "grown"])
    assert capsys.readouterr().out == "f.svg\nflops.png\n" and (tmp_path / "flops.png").exists()
    with pytest.raises(UserError, match="has no held-out f1; its scores are accuracy, lm loss$"):
        plot_score_by_flops(["grown"], tmp_path / "f.png", "f1")
    write(tmp_path / "old/metrics.jsonl", train(10, 5.0))
    with pytest.raises(UserError, match="old/metrics.jsonl does not tell the FLOPs of its run"):
        plot_score_by_flops(["old"], tmp_path / "f.png", "lm loss")


def test_the_command_takes_runs_as_words_and_as_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write(tmp_path / name / "metrics.jsonl", *run_of(2))
    main(["plot", "a", "--metrics", "b", "--metrics", "c", "--output", "abc.svg"])
    assert capsys.readouterr() == ("abc.svg\n", "")
    assert {f"{name} (held-out lm loss 4.000)" for name in "abc"} <= {*texts_of(tmp_path / "abc.svg")}
    for words, said in ((["plot"], "RUN is missing"), (["plot", "none"], "cannot read none")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1
