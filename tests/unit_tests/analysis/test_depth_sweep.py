"""Depths from one walk: equal to runs of their own, to training's evaluation, and to exits that nobody takes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.analysis import depth_sweep, subject
from megatron_recursive.analysis.depth_sweep import Sweep, record_of, run
from megatron_recursive.analysis.depth_walk import branches_of, passes_run, walk, walker_of
from megatron_recursive.analysis.exit_frontier import frontier
from megatron_recursive.commands import main
from megatron_recursive.data.cpython_corpus import CorpusDocument, is_held_out
from megatron_recursive.data.indexed import held_out_rows
from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.hf.recursive_models import VOCAB, make_config, make_model
from tests.unit_tests.inference.folders import write_plain, write_recursive
from tests.unit_tests.training.runs import FLAGS, records_of, save_to, train

DEPTHS = [1, 2, 4, 7]
RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
             "embedding_multiplier": 1.0}  # fmt: skip
LOOPED = {"recursion_family": "looped", "exit_gate": True, "halt_loss_weight": 0.0}
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # and the passes of one walk
    "core": ({"num_latent_refinements": 1}, 14),
    "looped": (LOOPED, 7),
    "hierarchical": ({"recursion_family": "hierarchical", "num_latent_refinements": 2}, 21),
    "recurrent": ({**RECURRENT, "injection": "concat", "state_init": "sampled"}, 1 + 7 + 4),
    "mean steps": ({**RECURRENT, "recurrence_step": "mean"}, 1 + 14 + 4),
    "gate": ({**RECURRENT, "recurrence_step": "mean", "boundary": "gate"}, 1 + 7 + 4),
    "core-end": ({**RECURRENT, "state_norm": "core-end"}, 1 + 7 + 3 + 4),
}  # fmt: skip


class Opened:
    def __init__(self, model: Any) -> None:
        self.model = model


def model_of(knobs: dict[str, Any]) -> Any:
    return make_model(config=make_config(recursion=knobs, num_layers=4))


def sweep_of(model: Any, rows: int = 4, **more: Any) -> Sweep:
    ids = torch.randint(0, VOCAB, (rows, 13), generator=torch.Generator().manual_seed(1))
    return Sweep(walker_of(Opened(model)), **{"depths": DEPTHS, "rows": ids, "batch_size": 2, **more})


def _texts(*names: str) -> Any:
    """A tokenizer of these words, by place; it ends what is written large with its end token, 0, as T5's does."""
    return Namespace(encode=lambda text: [names.index(text) + 1, *[0] * text.isupper()], end_ids=[0])


def test_without_text_what_corpus_holds_out_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"modules/{number}" for number in range(100)]
    monkeypatch.setattr(subject, "cpython_documents", lambda: [CorpusDocument(each, each) for each in names])
    rows = subject.text_rows(_texts(*names), [], 100, 2)
    held_out = {number + 1 for number, name in enumerate(names) if is_held_out(name)}
    assert set(rows[:, 0].tolist()) == held_out and 2 < len(held_out) < 30 and not rows[:, 1].any()


def test_one_end_token_stands_between_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in ("A", "b", "C")))
    rows = subject.text_rows(_texts("A", "b", "C"), [str(tmp_path / "a.jsonl")], 1, 6)
    assert rows.tolist() == [[1, 0, 2, 0, 3, 0]]


@pytest.mark.parametrize("kind", grid(FAMILIES, quick=["core", "recurrent", "mean steps", "core-end"]))
def test_one_walk_gives_every_depth(kind: str) -> None:
    knobs, passes = FAMILIES[kind]
    model, ids = model_of(knobs), torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    walker = walker_of(Opened(model))
    branches, ran = branches_of(walker.plan, DEPTHS), 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal ran
        ran += 1

    original = model.model.run_pass
    model.model.run_pass = lambda *a, **k: (count(), original(*a, **k))[1]
    with torch.no_grad():
        found = {depth: walker.logits(walker.output(states)) for depth, states in walk(walker, ids, branches)}
        assert ran == passes == passes_run(branches) < sum(each.plan.num_passes for each in branches)
        for depth, logits in found.items():
            model.set_num_refinement_blocks(depth)
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


class Known:
    """Says min(passes so far, token) of a token, so that its answer settles at pass ``token``."""

    has_own_passes = False

    def __init__(self) -> None:
        self.plan = build_plan(RecursionConfig(recursion_family="looped", num_refinement_blocks=4,
                                               embedding_multiplier=1.0))  # fmt: skip

    def begin(self, ids_BS: Tensor) -> Any:
        return ids_BS.flatten(), 0

    def advance(self, states: Any, plan: RecursionPlan, first: int, stop: int | None) -> Any:
        return states[0], states[1] + len(plan.passes[first:stop])

    def output(self, states: Any) -> Tensor:
        return states[0].clamp(max=states[1])

    def logits(self, output: Tensor) -> Tensor:
        return 9.0 * F.one_hot(output, 16)


def test_passes_with_adapters_of_their_own_keep_their_depth() -> None:
    walker = Known()
    walker.has_own_passes = True
    with pytest.raises(UserError, match="none for those of another depth; give --depths"):
        Sweep(walker, [1, walker.plan.depth], torch.ones(1, 9, dtype=torch.long), batch_size=1)


def test_answers_settle_where_they_were_made_to(tmp_path: Path) -> None:
    walker = Known()
    walker.model = Opened(None)  # type: ignore[attr-defined]
    walker.model.config = make_config()  # type: ignore[attr-defined]
    rows = torch.tensor([[1, 2, 3, 4, 8, 8, 8, 1, 1]] * 2)
    sweep = Sweep(walker, [1, 2, 4, 8], rows, batch_size=1)
    found = run(sweep, tmp_path, "known")
    record = record_of(sweep, found)
    errors = [float((each - found["loss"][2]).std()) / 4 for each in found["loss"]]  # of 16 tokens, trained at depth 4
    assert [each["standard_error"] for each in record["depths"]] == pytest.approx(errors) and errors[2] == 0 < errors[0]
    shares = {each["depth"]: each["share"] for each in record["settled"]["shares"]}
    assert shares == {1: 2 / 8, 2: 1 / 8, 4: 2 / 8, 8: 3 / 8}  # 3 settles between 2 and 4
    assert record["settled"]["mean_depth"] == (1 + 2 + 4 + 4 + 8 + 8 + 8 + 1) / 8
    assert [each["mean_depth"] for each in record["settled"]["by_position"]] == [1, 2, 4, 4, 8, 8, 8, 1]
    frequencies = {each["from"]: (each["tokens"], each["mean_depth"]) for each in record["settled"]["by_frequency"]}
    assert frequencies == {1: (16, 4.5)}
    assert record["depths"][3]["accuracy"] == 3 / 8  # 8 8, 8 8 and 1 1


@pytest.mark.parametrize("knobs", [{"num_latent_refinements": 1}, LOOPED], ids=["halting head", "exit gate"])
def test_the_frontier_ends_at_full_depth(knobs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(config=make_config(blocks=4, recursion=knobs, num_layers=2))
    sweep = sweep_of(model, depths=[1, 4, 8])
    found = run(sweep, tmp_path, "")
    record, exits = record_of(sweep, found), frontier(sweep, found, 2.5, measures=True)
    assert set(exits) == {"quantile" if "exit_gate" in knobs else "halting", "output-change", "kl", "argmax"}
    full = {each["depth"]: each for each in record["depths"]}
    for exit, curve in exits.items():
        points = curve["points"]
        means = [each["mean_depth"] for each in points]
        assert means == sorted(means) and means[-1] == 4 and len(set(means)) == len(means)
        assert points[-1]["loss"] == full[4]["loss"] and points[-1]["accuracy"] == full[4]["accuracy"]
        assert points[-1]["measured"]["mean_depth"] == 4
        assert points[-1]["measured"]["loss"] == pytest.approx(full[4]["loss"], abs=1e-6)
        first = points[0]
        assert first["mean_depth"] == (2 if exit in ("output-change", "kl") else first["mean_depth"])
        if exit in ("halting", "quantile"):
            assert first["mean_depth"] == 1 and first["loss"] == full[1]["loss"]
            assert first["measured"]["loss"] == pytest.approx(full[1]["loss"], abs=1e-6)
        if exit != "argmax":
            assert curve["asked"]["mean_depth"] == pytest.approx(2.5, abs=0.03)
            assert curve["asked"]["measured"]["mean_depth"] == pytest.approx(2.5, abs=0.3)
        flops = [each["flops_per_token"] for each in points]
        assert flops == sorted(flops) and flops[-1] >= full[4]["flops_per_token"]
    assert exits["output-change"]["points"][-1]["flops_per_token"] == full[4]["flops_per_token"]


def killed_at_the_second_batch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an item for each batch that is measured."""
    counted, measure = list[int](), depth_sweep._measure

    def dies(sweep: Sweep, batch: Tensor) -> dict[str, Tensor]:
        counted.append(1)
        if len(counted) == 2:
            raise KeyboardInterrupt
        return measure(sweep, batch)

    monkeypatch.setattr(depth_sweep, "_measure", dies)
    return counted


def test_a_killed_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of({"num_latent_refinements": 1})
    whole, counted = run(sweep_of(model), tmp_path / "whole", "a"), killed_at_the_second_batch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(sweep_of(model), tmp_path, "a")
    found = run(sweep_of(model), tmp_path, "a")
    assert len(counted) == 3 and all(torch.equal(found[name], whole[name]) for name in whole if name != "sharing")
    run(sweep_of(model), tmp_path, "a changed model")
    assert len(counted) == 5


# --- the command ----------------------------------------------------------------------------------------------------


def sweep(*words: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["sweep", *words, "--json"])
    return json.loads(said.getvalue())


def write_data(prefix: Path, above: int = 0, before: Sequence[int] = ()) -> None:
    """Five documents of 8 samples of 16 tokens, and one more token; ``before`` them others, of such lengths."""
    import numpy

    from megatron_recursive.data.indexed import write_index

    lengths = [40, 7, 31, 30, 21]
    first = numpy.arange(sum(before)) % 50
    ids = numpy.append(first, numpy.random.RandomState(0).randint(0, 126, sum(lengths))).astype("u2")
    ids[-1] = above or ids[-1]
    lengths = [*before, *lengths]
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    write_index(prefix.with_suffix(".idx"), "u2", lambda: [lengths])


def test_of_a_prefix_that_was_trained_on_the_held_out_documents_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", before=[50, 20])
    write_data(tmp_path / "held-out")

    def rows(prefix: str, **trained: Any) -> list[list[int]]:
        found: list[list[int]] = held_out_rows(prefix, 99, 16, 1, trained, "CKPT").tolist()
        return found

    whole, apart = rows("data"), rows("held-out")
    assert rows("data", data_path=["other"], split="2,5,0") == whole != apart and not capsys.readouterr().err
    assert rows(f"{tmp_path}/data", data_path=["0.5", "other", "0.5", "data"], split="2,5,0") == apart
    assert "CKPT was trained on" in capsys.readouterr().err
    assert rows("data", chat_data="data", split="2,5,0") == apart and "held out" in capsys.readouterr().err
    for trained in ({"data_path": ["data"]}, {"data_path": ["data"], "split": "1"}, {"train_data_path": ["data"]},
                    {"chat_data": "data", "valid_chat_data": "x", "split": "2,5,0"}):  # fmt: skip
        assert rows("data", **trained) == whole
        said = capsys.readouterr().err
        assert said.startswith("WARNING: CKPT was trained on data") and said.count("\n") == 1
    with pytest.raises(UserError, match="data has 129 tokens, fewer than one sample of --seq-length 150"):
        held_out_rows("data", 1, 150, 1, {"data_path": ["data"], "split": "2,5,0"}, "CKPT")


def test_the_command_writes_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, output = [write_recursive(tmp_path / "a"), write_plain(tmp_path / "b")], tmp_path / "new" / "found.json"
    (tmp_path / "a.txt").write_text("Once upon a time there was a held-out text.\n" * 4)
    words = ["--model", *map(str, folders), "--depths", "1,2,5", "--seq-length", "32", "--num-samples", "3", "--text",
             str(tmp_path / "a.txt"), "--output", str(output)]  # fmt: skip
    record = sweep(*words)
    assert json.loads(output.read_text()) == record and output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert [[each["depth"] for each in model["depths"]] for model in record["models"]] == [[1, 2, 3, 5], [1]]
    assert [model["trained_depth"] for model in record["models"]] == [3, 1] and not record["models"][1]["exits"]
    assert sorted(file.name for file in output.parent.iterdir()) == ["found.json", "found.png"]
    main(["sweep", *words, "--mean-depth", "2"])
    said = capsys.readouterr().out
    assert "trained depth 3; 3 samples, 96 tokens" in said and "10 passes for 22 run separately" in said
    assert "answers settle at depth" in said and "asked" in said and "halting" in said


def test_a_killed_command_goes_on_where_its_output_lies_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_recursive(tmp_path / "model")
    (tmp_path / "a.txt").write_text("Once upon a time there was a held-out text.\n")
    words = ["--model", str(folder), "--depths", "1", "--seq-length", "8", "--num-samples", "3", "--batch-size", "1",
             "--text", str(tmp_path / "a.txt"), "--output", str(folder / "found.json")]  # fmt: skip
    counted = killed_at_the_second_batch(monkeypatch)
    with pytest.raises(SystemExit):
        sweep(*words)
    assert len(list((folder / "found.json.parts").glob("*.safetensors"))) == 1
    sweep(*words)
    assert len(counted) == 4, "the first batch is not measured again"


def test_two_with_one_output_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_recursive(tmp_path / "model"), tmp_path / "found.json"
    (tmp_path / "a.txt").write_text("Once upon a time there was a held-out text.\n")
    words = ["--model", str(folder), "--depths", "1", "--seq-length", "8", "--num-samples", "1", "--text",
             str(tmp_path / "a.txt"), "--output", str(output)]  # fmt: skip
    capsys.readouterr()
    (parts := tmp_path / "found.json.parts").mkdir()
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="2"):
            sweep(*words)
    said = capsys.readouterr().err
    assert said == f"error: another run is writing --output {output}; wait for it or choose another\n"
    assert (parts / "lock").exists() and not output.exists()
    sweep(*words)
    assert output.exists() and not parts.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "nowhere.jsonl"], "--text nowhere.jsonl does not exist"),
        (["--seq-length", "64"], "--seq-length 64 must lie between 2 and the 48 positions"),
        (["--depths", "1,0"], "--depths: '1,0' is no list of numbers"),
        (["--text", "PREFIX"], "--text has the token id 300, but"),
        (["--text", "SMALL", "--answer-tokens", "900"], "--answer-tokens 900 leaves no token of --text to be judged"),
        (["--mean-depth", "0"], "--mean-depth must be positive"),
        (["--output", "found.txt"], "--output found.txt must end with .json"),
    ],
)
def test_mistakes_end_in_a_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", above=300)
    write_data(tmp_path / "small")
    prefixes = {"PREFIX": str(tmp_path / "data"), "SMALL": str(tmp_path / "small")}
    words = [prefixes.get(word, word) for word in words]
    folder = str(write_recursive(tmp_path / "model"))
    capsys.readouterr()  # what transformers says of writing it
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--model", folder, "--num-samples", "1", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1, err
    assert not Path("runs", "sweep.json.parts").exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------

SIZES = "--seq-length 16 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope"


def _sweep_and_its_export(checkpoint: str, folder: str) -> list[dict[str, Any]]:
    from megatron_recursive.backends import cpu
    from megatron_recursive.hf.convert.export import export_model

    cpu.install(on_purpose=True)
    export_model(checkpoint, f"{folder}/export", say=lambda _: None)
    words = ["--depths", "1,2,4", "--seq-length", "16", "--mean-depth", "1.5", "--measure-exits"]
    words += ["--output", f"{folder}/found.json"]
    given = {checkpoint: "data", f"{folder}/export": "held-out"}
    return [sweep("--model", model, "--text", f"{folder}/{text}", *words)["models"][0] for model, text in given.items()]


@pytest.mark.grid
def test_a_checkpoint_of_four_ranks_gives_trainings_evaluation_and_its_exports_figures(tmp_path: Path) -> None:
    write_data(tmp_path / "data", before=[50, 20])
    write_data(tmp_path / "held-out")
    flags = [*SIZES.split(), "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
             "--padded-vocab-size", "128", "--vocab-size", "128", "--eval-iters", "2", "--lr", "3e-2",
             "--data-path", str(tmp_path / "data"), "--split", "2,5,0"]  # fmt: skip
    words = [each for each in FLAGS if each not in ("--mock-data", "--split", "90,5,5")]
    assert train(*save_to(tmp_path / "ckpt", 6), *flags, flags=words, world_size=4) is None
    told = records_of(tmp_path / "ckpt", "valid")[-1]
    ((ckpt, export),) = run_distributed(
        _sweep_and_its_export, 1, str(tmp_path / "ckpt"), str(tmp_path), timeout=180
    )
    assert (ckpt["kind"], export["kind"], ckpt["tokens"]) == ("checkpoint", "recursive", 128)
    losses = {each["depth"]: each["loss"] for each in ckpt["depths"]}
    assert losses[2] == pytest.approx(told["lm loss"], abs=1e-5)
    assert losses[1] == pytest.approx(told["lm loss block 1"], abs=1e-5) and abs(losses[1] - losses[2]) > 1e-4
    for mine, theirs in zip(ckpt["depths"], export["depths"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert ckpt["settled"] == export["settled"] and ckpt["sharing"]["largest_difference"] < 1e-5
    for exit, curve in ckpt["exits"].items():
        assert curve["asked"]["measured"]["loss"] == pytest.approx(
            export["exits"][exit]["asked"]["measured"]["loss"], abs=2e-2
        )
        assert curve["points"][-1]["measured"]["loss"] == pytest.approx(losses[2], abs=1e-5)
