import json

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plots.run_summary import summarize_run

RUN = {"kind": "run", "iteration": 0, "description": "2 layers of width 8, 3 blocks, 9 passes", "parameters held": 1234,
       "parameters unrolled": 9876, "tokens per iteration": 64, "world size": 2}  # fmt: skip


def write(file, *records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def test_what_a_stranger_wants_to_know_is_there(tmp_path):
    train = [{"kind": "train", "iteration": i, "lm loss": 9.0 - i, "halt loss": 0.5} for i in (1, 2, 3)]
    valid = {"kind": "valid", "iteration": 3, "lm loss": 6.5, "lm loss block 1": 7.25, "lm loss block 2": 6.5,
             "expected refinement steps": 1.75}  # fmt: skip
    alarm = {"kind": "alarm", "iteration": 3, "alarm": "tokens have collapsed."}
    text = summarize_run(write(tmp_path / "m.jsonl", RUN, *train, valid, RUN, alarm))
    assert "2 layers of width 8, 3 blocks, 9 passes; parameters held 1,234, unrolled 9,876" in text
    assert "iterations 1 to 3: lm loss 8.000 -> 6.000, halt loss 0.500 -> 0.500" in text
    assert "after each refinement block: 1: 7.250, 2: 6.500" in text
    assert "halting threshold: 1.75" in text
    assert "started 2 times" in text and "ALARM at iteration 3: tokens have collapsed." in text


def test_a_run_without_metrics_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no training metrics yet"):
        summarize_run(write(tmp_path / "m.jsonl", RUN))
