"""The kinds of ``megatron-recursive plot`` besides runs: what stands in each picture, and what is refused."""

import json
import re

import matplotlib
import pytest
from matplotlib import pyplot

from megatron_recursive.commands import main
from megatron_recursive.plan import RecursionConfig, StepPlans, build_plan
from megatron_recursive.plots.recursion_plan import draw_plan
from megatron_recursive.plots.schedules import draw_steps, draw_three, three_schedules

SIZES = ["--num-layers", "4", "--hidden-size", "16", "--num-attention-heads", "2"]
SWEEP = {"format": "megatron-recursive sweep", "version": 1}
LAYERS = {"format": "megatron-recursive layers", "version": 1, "model": "m", "samples": 2, "sequence_length": 8,
          "prelude": [0], "core": [1], "coda": [], "left_out": [],
          "layers": [{"influence": 0.1, "distance": 0.2}, {"influence": 0.3, "distance": 0.4}]}  # fmt: skip


def config_of(**knobs):
    return RecursionConfig(**knobs).resolved(embedding_init_std=0.02)


def steps_of(iterations=100, **knobs):
    config = config_of(**knobs)
    return StepPlans(config, build_plan(config), iterations=iterations)


@pytest.fixture
def axes():
    figure, grid = pyplot.subplots(2, 2)
    yield list(grid.flat)
    pyplot.close(figure)


def lines_of(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def texts_of(picture):
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text())


def sweep_of(name, losses):
    depths = [{"depth": n, "loss": loss} for n, loss in losses.items()]
    settled = {"shares": [{"depth": n, "share": 1 / len(losses)} for n in losses]}
    return {**SWEEP, "models": [{"model": name, "trained_depth": 2, "depths": depths, "settled": settled, "exits": {}}]}


def test_a_plan_shows_where_each_pass_lies_what_it_reads_and_what_it_teaches(axes):
    plan = build_plan(config_of(num_refinement_blocks=2, num_latent_refinements=2, detach_between_refinements=True))
    draw_plan(axes[0], plan)
    boxes = [box for bars in axes[0].containers for box in bars]
    assert [(round(box.get_x() + 0.36), round(box.get_y() + 0.28)) for box in boxes] == [
        (n, {"latent": 1, "output": 2}[p.target]) for n, p in enumerate(plan.passes, start=1)
    ]
    assert [box.get_hatch() is None for box in boxes] == [p.grad for p in plan.passes] == [False] * 3 + [True] * 3
    arrows = [text for text in axes[0].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == sum(len(p.reads) for p in plan.passes) == 16
    lines = lines_of(axes[0])
    assert lines["language-model loss, with its weight"][0] == [6] and lines["halting loss"][0] == [3, 6]
    assert lines["states cut from the graph"][0] == [3.5, 3.5]
    assert {"block 1", "block 2", "1"} <= {text.get_text() for text in axes[0].texts}
    knobs = {"num_recurrences": 4, "recurrence_step": "mean", "num_prelude_layers": 1, "injection": "concat"}
    draw_plan(axes[1], build_plan(config_of(recursion_family="recurrent", **knobs)))
    assert [text.get_text() for text in axes[1].texts].count("0.25\nconcat") == 4
    assert {"prelude layers, with gradient", "core layers, with gradient"} <= {*axes[1].get_legend_handles_labels()[1]}


def test_schedules_of_depth_gradient_and_supervision(axes):
    knobs = {"recursion_family": "recurrent", "num_recurrences": 8, "injection": "add", "backprop_depth": 4}
    steps = steps_of(**knobs, recurrence_curriculum="linear", backprop_curriculum="linear")
    draw_steps(axes, steps, lambda plan: float(plan.num_passes))
    assert lines_of(axes[0])["of a step"] == (list(range(100)), [steps.depth_at(n) for n in range(100)])
    assert lines_of(axes[0])["its mean"][1][::25] == [1, 8, 8, 8]
    assert lines_of(axes[1])["with gradient"][1] == [len(steps.plan_at(n).grad_passes) for n in range(100)]
    assert lines_of(axes[3])["of a step"][1] == lines_of(axes[1])["of a step"][1]


def test_deep_supervision_is_shown_with_its_ramp_and_what_its_schedules_weigh_and_cost(axes):
    deep = {"enable_deep_supervision": True, "deep_supervision_warmup": (20, 60)}
    drawn = {"recurrence_distribution": "uniform", "mean_recurrence": 3.0}
    steps = steps_of(**deep, **drawn, detach_between_refinements=False)
    draw_steps(axes[:3], steps, None)
    first = lines_of(axes[2])["after block 1"][1]
    assert first[:21] == [0] * 21 and first[40] == pytest.approx(0.25 / 1.5) and first[60:] == [0.25] * 40
    plans = three_schedules(steps)
    draw_three(axes[3], plans, lambda plan: 2.0 if plan is plans["linear_decay"] else 1.0)
    lines = {label.split(":")[0]: (label, y) for label, (_, y) in lines_of(axes[3]).items()}
    assert lines["constant"][1] == [0.25, 0.25, 0.5] and lines["none"][1] == [0, 0, 1]
    assert lines["linear_decay"][1] == pytest.approx([1 / 9, 2 / 9, 2 / 3])
    assert lines["linear_decay"][0].endswith("21 of 21 passes with gradient, losses of 3, 2 x the FLOPs")
    assert three_schedules(steps_of(recursion_family="recurrent")) == {}


def test_the_command_draws_each_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    (tmp_path / "layers.json").write_text(json.dumps(LAYERS))
    for name, losses in (("a", {1: 3.0, 2: 2.0}), ("b", {1: 4.0, 2: 2.5})):
        (tmp_path / f"{name}.json").write_text(json.dumps(sweep_of(name, losses)))
    for words, picture in (
        (["plan", "--disable-recursive-refinement"], "plan.png"), (["layers", "layers.json"], "layers.png"),
        (["schedule", *SIZES, "--train-iters", "20", "--output", "s.pdf"], "s.pdf"),
        (["sweep", "a.json", "b.json", "--output", "ab.svg"], "ab.svg"),
    ):  # fmt: skip
        main(["plot", *words])
        assert capsys.readouterr() == (f"{picture}\n", "") and (tmp_path / picture).stat().st_size > 5000, words
    assert {"a", "b", "depth (star: as trained)"} <= {*texts_of(tmp_path / "ab.svg")}
    main(["plot", "plan", *SIZES, "--recursion-family", "looped", "--output", "plan.svg"])
    title = next(text for text in texts_of(tmp_path / "plan.svg") if text.startswith("looped"))
    assert title.startswith("looped: 3 passes, 3 with gradient, 4 layers, 12 applied, ")


def test_what_a_kind_does_not_draw_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "layers.json").write_text(json.dumps(LAYERS))
    for words, sentence in {
        "plan file": "The kind plan draws no file such as file",
        "plan --num-layers 4": "--hidden-size and --num-attention-heads missing",
        "plan --train-iters 5": "--train-iters belongs to the kind schedule, not to plan",
        "schedule --train-iters 0": "--train-iters must be positive",
        "schedule --x flops": "--x belongs to the kind runs",
        "runs a --num-recurrences 3": "--num-recurrences belongs to the kind plan or schedule, not to runs",
        "layers": "FILE is missing; the kind layers draws JSON of the command layers",
        "layers layers.json layers.json": "The kind layers draws one file, but 2 are given",
        "layers none.json": "cannot read none.json as JSON ([Errno 2] No such file",
        "sweep bad.json": "cannot read bad.json as JSON (Expecting",
        "sweep layers.json": "layers.json is no JSON of the command sweep in version 1",
        "plan --num-refinement-blocks 0": "--num-refinement-blocks must be at least 1",
        "plan --output plan.doc": "--output plan.doc has no picture's suffix",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(["plot", *words.split()])
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1) and sentence in err, (words, err)
