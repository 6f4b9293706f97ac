import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plots.loss_curve import plot_loss_curve, read_curves

ROOT = Path(__file__).parents[3]


def line(iteration, kind, **metrics):
    return json.dumps({"iteration": iteration, "kind": kind, **metrics}) + "\n"


def run_of(blocks):
    for iteration in range(10, 60, 10):
        yield line(iteration, "train", **{"lm loss": 9 - iteration / 10, "halt loss": 0.7, "total loss": 9.5})
        per_block = {f"lm loss block {b}": 9 - iteration / 10 - 0.1 * b for b in range(1, blocks + 1)}
        changes = {f"output change block {b}": 1 / b for b in range(1, blocks + 1)}
        yield line(iteration, "valid", **{"lm loss": 9.1 - iteration / 10}, **per_block, **changes, note="ignored")


@pytest.mark.parametrize("blocks", [0, 1, 12])
def test_a_picture_is_drawn_beside_the_metrics(tmp_path, blocks):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(run_of(blocks)))
    assert plot_loss_curve(metrics) == tmp_path / "metrics.png"
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.png"]


def test_later_lines_of_a_resumed_run_replace_earlier_ones(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    # Block 9 was logged before the resume only; the replaced line takes it along.
    first = line(10, "train", **{"lm loss": 5.0}) + line(20, "train", **{"lm loss": 9.0, "lm loss block 9": 1.0})
    resumed = line(20, "train", **{"lm loss": 4.0}) + line(20, "valid", **{"lm loss": 4.5})
    metrics.write_text(first + resumed + line(30, "train", **{"lm loss": float("nan")}) + '{"iteration": 40, "ki')
    curves = read_curves(metrics)
    assert set(curves) == {("train", "lm loss"), ("valid", "lm loss")}
    assert list(curves["train", "lm loss"]) == [10, 20, 30]
    assert curves["train", "lm loss"][20] == 4.0
    assert curves["valid", "lm loss"] == {20: 4.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{\n", ":2 is not valid JSON"),
        ("[]\n", ":2 is not a JSON object"),
        (line(1, "best"), ":2 has the kind 'best'"),
        (line("1", "train"), ":2 has the iteration '1'"),
        (line(1, "train", **{"lm loss": "low"}), ":2 has 'low' under 'lm loss'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, said):
    (tmp_path / "m.jsonl").write_text(line(1, "train", **{"lm loss": 1}) + text)
    with pytest.raises(UserError) as caught:
        plot_loss_curve(tmp_path / "m.jsonl")
    assert f"{tmp_path / 'm.jsonl'}{said}" in str(caught.value)


def test_missing_empty_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl .No such file"):
        plot_loss_curve(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no losses"):
        plot_loss_curve(tmp_path / "empty.jsonl")
    (tmp_path / "m.jsonl").write_text("".join(run_of(1)))
    with pytest.raises(UserError, match="cannot write .*empty.jsonl/a.png"):
        plot_loss_curve(tmp_path / "m.jsonl", tmp_path / "empty.jsonl" / "a.png")
    with pytest.raises(UserError, match="end it with one of .png, .pdf, .svg"):
        plot_loss_curve(tmp_path / "empty.jsonl", tmp_path / "a.doc")


def test_the_command(tmp_path):
    def run(*flags):
        command = [sys.executable, ROOT / "tools/plot_metrics.py", *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    (tmp_path / "m.jsonl").write_text("".join(run_of(2)))
    done = run("--metrics", "m.jsonl", "--output", "new/curve.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, "new/curve.svg\n", "")
    assert "<svg" in (tmp_path / "new/curve.svg").read_text()

    (tmp_path / "m.jsonl").write_text("nonsense\n")
    done = run("--metrics", "m.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: m.jsonl:1 is not valid JSON; remove the line\n"
