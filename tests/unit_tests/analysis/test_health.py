"""Health of known answers: resets are fewer blocks, identities stand still, probabilities are as they were made."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.analysis.depth_sweep import Sweep
from megatron_recursive.analysis.depth_walk import walker_of
from megatron_recursive.analysis.health import _left, calibration, examine, projected
from megatron_recursive.commands import main
from megatron_recursive.commands.health import table
from megatron_recursive.errors import UserError
from megatron_recursive.hf.model.exits_recursive_gpt import ExitOptions
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.analysis.test_depth_sweep import FAMILIES, SIZES, Opened, model_of, write_data
from tests.unit_tests.hf.recursive_models import VOCAB, make_config, make_model
from tests.unit_tests.inference.folders import write_plain, write_recursive
from tests.unit_tests.training.runs import FLAGS, RECURSION, save_to, train


def examined(model: Any, rows: Tensor | None = None, **more: Any) -> dict[str, Any]:
    if rows is None:
        rows = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    return examine(Sweep(walker_of(Opened(model)), [], rows, batch_size=2, **more))


def loss_at(model: Any, depth: int) -> float:
    rows = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    before = model.config.recursion_plan
    model.set_num_refinement_blocks(depth)
    with torch.no_grad():
        logits = model(rows[:, :-1], use_cache=False).logits
    model.config.set_plan(before)
    model.model._read_plan()
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.parametrize("kind", grid(FAMILIES, quick=["core", "recurrent", "core-end", "mean steps"]))
def test_a_reset_is_a_run_of_fewer_blocks_and_one_more_is_one_deeper(kind: str) -> None:
    model = model_of(FAMILIES[kind][0])
    plan, record = model.config.recursion_plan, examined(model)
    assert [each["remaining"] for each in record["reset"]] == [1, 2] and record["depth"] == 3
    assert record["loss"] == pytest.approx(loss_at(model, 3), abs=1e-5)
    if kind != "mean steps":  # which are others at every depth
        for each in record["reset"]:
            assert each["loss"] == pytest.approx(loss_at(model, each["remaining"]), abs=1e-5)
        assert record["one_more"]["loss"] == pytest.approx(loss_at(model, 4), abs=1e-5)
    else:
        assert abs(record["one_more"]["loss"] - loss_at(model, 4)) > 1e-4
    assert all(each["standard_error"] > 1e-5 for each in (*record["reset"], record["one_more"]))
    assert abs(record["one_more"]["loss"] - record["loss"]) > 1e-4 and record["one_more"]["distance"] > 1e-3
    ends = [each for each in record["passes"] if each["ends_block"]]
    assert [each["pass"] for each in ends] == [each.index + 1 for each in plan.block_ends]
    if not plan.has_inner_depth:
        assert [each["loss"] for each in ends] == pytest.approx([loss_at(model, n) for n in (1, 2, 3)], abs=1e-5)
    assert ends[-1]["loss"] == record["loss"] and ends[-1]["agrees"] == 1
    assert all(("loss" in each) == (each["target"] == "output") and each["change"] > 0 for each in record["passes"])
    assert ("exits" in record) == ("calibration" in record or plan.exit_gate) == (not plan.has_inner_depth)
    assert set(record["left_out"]) == {"exits", "calibration"} - set(record)


def identity(embedding: Tensor, blocks: int = 4) -> Any:
    """Its layers add nothing, and no norm closes its passes."""
    knobs = {"recursion_family": "looped", "state_norm": "none", "embedding_multiplier": 1.0}
    model = make_model(config=make_config(blocks=blocks, recursion=knobs))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_a_core_that_is_the_identity_stands_still() -> None:
    rows = torch.arange(26).view(2, 13)
    record = examined(identity(torch.eye(VOCAB, 32)), rows)
    assert record["one_more"] == {"distance": 0, "loss": record["loss"], "standard_error": 0}
    assert all((each["loss"], each["standard_error"]) == (record["loss"], 0) for each in record["reset"])
    for each in record["passes"]:
        assert (each["change"], each["token_cosine"], each["loss"], each["agrees"]) == (0, 0, record["loss"], 1)
    followed = record["trajectories"]["tokens"]
    assert [each["position"] for each in followed] == [1, 2, 4, 6, 7, 9, 11]
    assert all(len(each["points"]) == 4 and each["points"][0] == each["points"][3] for each in followed)
    assert record["exits"]["argmax"]["mean_depth"] == 2 and record["exits"]["output-change"]["mean_depth"] == 2
    alike = examined(identity(torch.ones(VOCAB, 32)), rows)
    assert all(each["token_cosine"] == pytest.approx(1) for each in alike["passes"])


def test_one_block_leaves_out_what_it_does_not_have() -> None:
    record = examined(identity(torch.eye(VOCAB, 32), blocks=1))
    assert set(record["left_out"]) == {"reset", "exits"} and record["calibration"]["bins"]
    assert all(len(each["points"]) == 1 for each in record["trajectories"]["tokens"])


def test_adapters_of_each_pass_have_none_for_one_more() -> None:
    rows = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    walker = walker_of(Opened(model_of(FAMILIES["core"][0])))
    walker.has_own_passes = True
    record = examine(Sweep(walker, [], rows, batch_size=2))
    assert "one_more" not in record and record["left_out"]["one_more"] == "each pass has adapters of its own"
    assert "one more" not in "\n".join(table(record | {"model": "m", "samples": 3})).partition("left out")[0]


def test_answers_alone_are_judged() -> None:
    record = examined(model_of({"num_latent_refinements": 1}), first_answer=50)
    assert 0 < record["tokens"] < 36 and sum(each["tokens"] for each in record["calibration"]["bins"]) < 3 * 36
    with pytest.raises(UserError, match="leaves no token of --text to be judged"):
        examined(model_of({"num_latent_refinements": 1}), first_answer=VOCAB)


def test_calibration_of_probabilities_made_by_hand() -> None:
    probability = torch.tensor([0.05, 0.15, 0.15, 0.95, 1.0])
    found = calibration(probability, torch.tensor([False, False, True, True, True]))
    bins = [(each["from"], each["tokens"], each["right"]) for each in found["bins"]]
    assert bins == [(0, 1, 0), (0.1, 2, 0.5), (0.9, 2, 1)]
    assert [each["probability"] for each in found["bins"]] == pytest.approx([0.05, 0.15, 0.975])
    assert found["expected_error"] == pytest.approx((0.05 + 2 * 0.35 + 2 * 0.025) / 5)


def test_halted_tokens_made_by_hand() -> None:
    options = ExitOptions("halting", 0.5, 0.0, 2, max_blocks=3, trained_blocks=3)
    asked = torch.tensor([[0.9, 0.1, 0.2, 0.5], [0.1, 0.7, 0.1, 0.1]])  # leave after 1, 2, 3, 1
    right = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    found = _left(options, asked, right)
    assert (found["threshold"], found["mean_depth"], found["accuracy"]) == (0.5, 7 / 4, 3 / 4)
    assert found["early"] == {"share": 3 / 4, "accuracy": 2 / 3, "accuracy_after_all": 2 / 3, "accuracy_of_others": 1}
    assert [(each["share"], each["accuracy"]) for each in found["blocks"]] == [(2 / 4, 1 / 2), (1 / 4, 1), (1 / 4, 1)]


def test_principal_axes_of_a_plane() -> None:
    axes = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double())[0].T
    made = torch.tensor([[[3.0, 1], [-3, 1]], [[3, -1], [-3, -1]]]).double()
    points, shares = projected(5 + made @ axes)
    assert shares == pytest.approx([0.9, 0.1]) and torch.allclose(points.abs(), made.abs())


# --- the command ----------------------------------------------------------------------------------------------------


def health(*words: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["health", *words, "--json"])
    return json.loads(said.getvalue())


def test_the_command_writes_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_recursive(tmp_path / "a"), tmp_path / "new" / "found.json"
    (tmp_path / "a.txt").write_text("Once upon a time there was a held-out text.\n" * 4)
    words = ["--model", str(folder), "--seq-length", "32", "--num-samples", "3", "--text", str(tmp_path / "a.txt"),
             "--output", str(output)]  # fmt: skip
    record = health(*words)
    assert json.loads(output.read_text()) == record and output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert (record["format"], record["version"], record["kind"]) == ("megatron-recursive health", 1, "recursive")
    assert (record["family"], record["depth"], record["tokens"]) == ("core", 3, 96) and record["left_out"] == {}
    assert sum(each["tokens"] for each in record["calibration"]["bins"]) == 3 * 96
    for found in record["exits"].values():
        assert sum(each["share"] for each in found["blocks"]) == pytest.approx(1)
    said = "\n".join(table(record))
    for part in ("the state reset before the last 2", "one more, which moves", "expected calibration error", "exit kl"):
        assert part in said
    plain = write_plain(tmp_path / "b")
    with pytest.raises(SystemExit) as ended:
        main(["health", "--model", str(plain), *words[2:]])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(
        f"error: --model {plain} is a plain model, which makes no states; name a recursive one.\n"
    )


# --- checkpoints ----------------------------------------------------------------------------------------------------

LEARNED = {
    "core": RECURSION,
    "recurrent": ["--recursion-family", "recurrent", "--num-layers", "4", "--num-prelude-layers", "1",
                  "--num-coda-layers", "1", "--num-recurrences", "3"],
    "exit gate": ["--recursion-family", "looped", "--exit-gate", "--num-refinement-blocks", "3"],
}  # fmt: skip


def _of_checkpoint_and_export(checkpoint: str, folder: str, prefix: str) -> list[dict[str, Any]]:
    from megatron_recursive.backends import cpu
    from megatron_recursive.hf.convert.export import export_model

    cpu.install(on_purpose=True)
    export_model(checkpoint, f"{folder}/export", say=lambda _: None)
    words = ["--seq-length", "16", "--text", prefix, "--output", f"{folder}/found.json"]
    return [health("--model", each, *words) for each in (checkpoint, f"{folder}/export")]


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.grid
@pytest.mark.parametrize("kind", LEARNED)
def test_a_checkpoint_is_as_its_export(kind: str, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    flags = [*SIZES.split(), "--padded-vocab-size", "128", "--vocab-size", "128", "--lr", "3e-2", "--train-data-path",
             str(tmp_path / "data")]  # fmt: skip
    words = [each for each in FLAGS if each not in ("--mock-data", "--split", "90,5,5")]
    assert train(*save_to(tmp_path / "ckpt", 6), *flags, flags=words, recursion=LEARNED[kind]) is None
    ((ckpt, export),) = run_distributed(
        _of_checkpoint_and_export, 1, str(tmp_path / "ckpt"), str(tmp_path), str(tmp_path / "data"), timeout=180
    )
    assert (ckpt.pop("kind"), export.pop("kind")) == ("checkpoint", "recursive")
    assert ckpt["left_out"] == export["left_out"] and ckpt["passes"][0].keys() == export["passes"][0].keys()
    assert numbers(ckpt) == pytest.approx(numbers(export), abs=2e-4)
    assert len(numbers(ckpt)) > 50
