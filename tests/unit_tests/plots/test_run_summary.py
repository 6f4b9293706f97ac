import json

import pytest

from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from megatron_recursive.plots.run_summary import summarize_runs
from tests.unit_tests.plots.records import start, train, valid, write


def test_what_a_stranger_wants_to_know_is_there(tmp_path):
    by_block = {"lm loss block 1": 7.5, "lm loss block 3": 6.25}
    steps = [train(i, 9.0 - i, **{"halt loss": 0.5}, **by_block, time=10.0 * i) for i in (1, 2, 3)]
    told = {"expected refinement steps": 1.75, "lm loss depth 16": 6.25, "lm loss depth 3": 6.5}
    evaluated = valid(3, 7.25, 6.5, 6.5, **told, time=3700.0)
    alarm = {"kind": "alarm", "iteration": 4, "alarm": "tokens have collapsed."}
    fourth = train(4, 5.0, **by_block, time=5020.0)
    resumed = start(iteration=3, time=5000.0), fourth, alarm, start(time=9000.0, iteration=4)
    file = write(tmp_path / "m.jsonl", start(time=0.0), *steps, evaluated, *resumed)
    text, figures = summarize_runs([file])
    assert all(len(line) <= 100 for line in text.split("\n"))
    text = text.replace("\n  ", " ")
    assert "2 layers of width 8, 3 blocks, 9 passes; parameters held 1,234, unrolled 9,876" in text
    assert "spent: 256 tokens, 2.56e08 FLOPs, 1h02m" in text
    assert "iterations 1 to 4: lm loss 8.000 -> 6.500" in text
    assert "the mean of 4 single iterations, the last logged" in text
    assert "after each refinement block: 1: 7.250, 2: 6.500, 3: 6.500" in text
    assert "training lm loss after each refinement block: 1: 7.500, 3: 6.250" in text
    assert "block 2 adds 0.750, block 3 adds 0.000 nats: all after block 2 adds nothing" in text
    assert "held-out lm loss at depths: 3: 6.500, 16: 6.250" in text
    assert "beside a run with --disable-recursive-refinement" in text
    assert "halting threshold: 1.75" in text
    assert "started 2 times (resumed from its checkpoints)" in text
    assert "ALARM at iteration 4: tokens have collapsed." in text
    assert figures["runs"][0]["blocks"] == [7.25, 6.5, 6.5] and figures["runs"][0]["seconds"] == 3720.0
    text, _ = summarize_runs([write(file, start(time=0.0), steps[0], start(time=99.0), steps[1])])
    assert "started 2 times\n" in f"{text}\n", "both began at iteration 0"


def runs(folder, **by_name):
    """Name -> (blocks, FLOPs per token, {iteration: losses by block})."""
    for name, (blocks, flops, losses) in by_name.items():
        evaluated = [valid(iteration, *each) for iteration, each in losses.items()]
        write(folder / name / "metrics.jsonl", start(blocks=blocks, flops=flops), train(1, 9.0), *evaluated)
    text, figures = summarize_runs([folder / name for name in by_name])
    assert all(len(line) <= 100 for line in text.split("\n"))
    return text.replace("\n  ", " "), figures


def test_a_recursion_that_does_not_earn_its_flops_is_told_so(tmp_path):
    text, figures = runs(
        tmp_path, default=(3, 5.4e6, {100: (6.0, 5.9, 5.9), 300: (5.82, 5.799, 5.799)}), plain=(0, 1e6, {300: (5.783,)})
    )
    header, first, second = text.split("\n")[:3]
    assert header.split() == ["run", "layers", "passes", "tokens", "FLOPs", "time", "held-out", "by", "block"]
    assert first.split() == ["default", "2", "9", "19.2k", "1.04e11", "-", "5.799", "5.820", "5.799", "5.799"]
    assert second.split() == ["plain", "2", "1", "19.2k", "1.92e10", "-", "5.783", "-"]
    assert (
        "At the same 19.2k tokens default has 5.799 and plain has 5.783: the recursion is worse by 0.016 nats at 5.4 "
        "times the FLOPs; it did not earn them."
    ) in text
    assert "default: block 2 adds 0.021, block 3 adds 0.000 nats: all after block 2 adds nothing" in text
    assert figures["comparisons"][0]["gain"] == pytest.approx(-0.016)


def test_what_recursion_buys_and_whether_it_is_worth_it(tmp_path):
    better = (2, 2e6, {100: (6.2, 6.0), 200: (5.6, 5.5)})
    text, _ = runs(tmp_path, plain=(0, 1e6, {100: (6.1,), 200: (5.8,)}), better=better)
    assert "better has 5.500 and plain has 5.800: the recursion buys 0.300 nats at 2 times the FLOPs." in text
    assert "At equal 1.28e10 FLOPs better (at 50% of its way) has 6.000 and plain has 5.800." in text
    assert "Whether it earned them, plain trained for as many (--train-iters 400) would tell." in text
    assert text.splitlines()[-1].startswith("each run is one seed:")
    text, _ = runs(tmp_path, longer=(0, 1e6, {200: (5.9,), 400: (5.45,)}), better=better)
    assert "longer (at 50% of its way) has 5.900: the recursion buys 0.400 nats" in text
    assert text.split("\n")[4].endswith("So it did not earn them.")
    text, _ = runs(tmp_path, longer=(0, 1e6, {200: (5.9,), 400: (5.6,)}), better=better)
    assert text.split("\n")[4].endswith("better has 5.500 and longer has 5.600. So it earned them.")


def test_runs_that_have_nothing_in_common_are_not_compared(tmp_path):
    text, _ = runs(tmp_path, a=(2, 2e6, {100: (6.0, 5.0)}), b=(2, 2e6, {300: (6.0, 5.0)}))
    assert "b and a have no evaluations at common tokens and known FLOPs." in text and "one seed" not in text
    text, _ = runs(tmp_path, a=(2, 2e6, {100: (6.0, 5.0)}), b=(2, 2e6, {100: (6.0, 5.001)}))
    assert "b changes nothing (less than 0.002 nats) at the same FLOPs." in text


def test_a_run_without_metrics_is_refused_and_figures_are_printed_as_json(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no metrics yet"):
        summarize_runs([write(tmp_path / "m.jsonl", start())])
    text, _ = summarize_runs([write(tmp_path / "m.jsonl", start(iteration=40, time=0.0), valid(40, 6.5, 6.0, 5.5))])
    assert text.startswith("evaluated: 2 layers of width 8, 3 blocks, 9 passes") and "at iteration 40: 5.500" in text
    write(tmp_path / "m.jsonl", start(), train(1, 2.0))
    main(["summarize", "--metrics", str(tmp_path / "m.jsonl"), "--json"])
    (figures,) = json.loads(capsys.readouterr().out)["runs"]
    assert figures["training"] == {"lm loss": {"first": 2.0, "mean of the last": 2.0, "of": 1}}


def test_carried_steps_cost_what_they_spent_and_not_what_their_tokens_would(tmp_path):
    spent = [valid(100 * n, 6.0, 5.5 - n / 10, tokens=1600 * n, FLOPs=6400e6 * n) for n in (1, 2)]
    write(tmp_path / "carried" / "metrics.jsonl", start(), train(1, 9.0), *spent)
    once = [valid(25 * n, 6.0, 5.6 - n / 10) for n in (1, 2)]
    write(tmp_path / "once" / "metrics.jsonl", start(), train(1, 9.0), *once)
    text, _ = summarize_runs([tmp_path / "once", tmp_path / "carried"])
    assert "is better by 0.100 nats at 4 times the FLOPs" in text.replace("\n  ", " ")
