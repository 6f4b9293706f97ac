"""Layers and windows with known answers: scores, boundaries, mean steps; and the command on folders and checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_recursive.analysis.layer_scores import looped, mean_loss, score_layers
from megatron_recursive.analysis.stacks import find_stacks
from megatron_recursive.analysis.subject import layers_of
from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from tests.distributed import run_distributed
from tests.unit_tests.hf.donors import make_donor, tokens
from tests.unit_tests.hf.recursive_models import make_config, make_model, make_tokens
from tests.unit_tests.inference.folders import write_plain, write_recursive


class Known(nn.Module):
    """A layer that does one thing to the stream; called as Megatron calls its own, or as transformers."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does = does

    def forward(self, hidden_states: Tensor) -> Any:
        first, second = hidden_states.chunk(2, dim=-1)
        turned = {"keep": hidden_states, "negate": -hidden_states, "triple": 3 * hidden_states,
                  "turn": torch.cat([-second, first], dim=-1)}[self.does]  # fmt: skip
        return (turned, None) if self.does == "turn" else turned


def test_layers_of_known_effect() -> None:
    layers = [Known(does) for does in ("keep", "negate", "triple", "turn")]

    def run(ids: Tensor) -> None:
        hidden = F.one_hot(ids, 32).float() + torch.randn(*ids.shape, 32)
        for layer in layers:
            result = layer(hidden_states=hidden) if layer.does == "negate" else layer(hidden)
            hidden = result[0] if isinstance(result, tuple) else result

    scores = score_layers(layers, run, torch.randint(32, (3, 2, 8)).unbind())
    assert scores.influence == pytest.approx([0, 2, 0, 1], abs=1e-7) and scores.influence[0] == 0
    assert scores.distance == pytest.approx([0, 1, 0, 0.5], abs=1e-7) and scores.applied == [1, 1, 1, 1]
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize("kind", ["llama3, head_dim", "mistral, one key head", "qwen2", "qwen3", "olmo2"])
def test_every_family_and_the_last_layer_before_the_norm(kind: str) -> None:
    """A last layer that adds nothing changes nothing, though the last hidden state of transformers is normed."""
    model, ids = make_donor(kind), tokens()
    layers = layers_of(model)
    with torch.no_grad():
        layers[-1].self_attn.o_proj.weight.zero_()
        layers[-1].mlp.down_proj.weight.zero_()
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    scores = score_layers(layers, lambda batch: model(input_ids=batch, use_cache=False), ids.split(1))
    assert scores.influence[-1] == scores.distance[-1] == 0 and not torch.equal(states[-1], states[-2])
    cosines = [F.cosine_similarity(a.double(), b.double(), dim=-1)
               for a, b in zip(states[:-2], states[1:-1], strict=True)]  # fmt: skip
    assert scores.influence[:-1] == pytest.approx([float(1 - each.mean()) for each in cosines], abs=1e-6)
    assert scores.distance[:-1] == pytest.approx([float(each.arccos().mean() / torch.pi) for each in cosines], abs=1e-6)


def test_a_recursive_model_is_scored_at_its_plans_layers() -> None:
    model = make_model(3, 1)
    scores = score_layers(layers_of(model), lambda ids: model(input_ids=ids, use_cache=False), [make_tokens(2, 8)])
    assert scores.applied == [6, 6]


# --- boundaries -----------------------------------------------------------------------------------------------------

FLAT = [0.10, 0.09, 0.10, 0.08, 0.09, 0.10]


def test_the_knees_bound_the_core() -> None:
    distance = [0.5, 0.3, *FLAT, 0.25]
    found = find_stacks(distance, distance)
    assert (found["prelude"], found["core"], found["coda"]) == ([0, 1], [2, 3, 4, 5, 6, 7], [8])
    assert found["boundaries"] == {"prelude": "kneedle", "coda": "kneedle"} and found["left_out"] == []
    influence = [9.0, 9.0, 0.1, 0.5, 0.3, 0.2, 0.4, 0.1, 9.0]
    kept = find_stacks(distance, influence, target=3)
    assert (kept["core"], kept["left_out"], kept["prelude"]) == ([3, 4, 6], [2, 5, 7], [0, 1])
    assert find_stacks([0.5, *FLAT[1:4], 0.09], FLAT)["prelude"] == [0]
    with pytest.raises(UserError, match=r"--target-recurrent-size 7 must lie between 1 and 6,"):
        find_stacks(distance, influence, target=7)


def test_a_curve_without_knees_is_cut_into_thirds() -> None:
    line = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.5, 0.6, 0.7]
    found = find_stacks(line, line)
    assert (found["prelude"], found["core"], found["coda"]) == ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    assert found["boundaries"] == {"prelude": "third", "coda": "third"}
    rising = find_stacks([0.1, 0.2, 0.9], [0.1, 0.2, 0.9])  # nothing falls
    assert rising["prelude"] == [] and rising["core"]
    one = find_stacks([0.5], [0.5])
    assert (one["prelude"], one["core"], one["coda"]) == ([], [0], [])


# --- windows --------------------------------------------------------------------------------------------------------


def test_a_window_that_adds_a_constant_loops_exactly() -> None:
    model, ids = make_donor("llama1, biases"), tokens()
    layers = layers_of(model)
    with torch.no_grad():
        for layer in layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    def loss(window: list[nn.Module] | None, repeats: int = 1) -> float:
        with looped(window, repeats) if window else contextlib.nullcontext():
            return mean_loss(lambda batch: model(input_ids=batch, use_cache=False).logits, ids.split(1))

    plain = loss(None)
    with torch.no_grad():
        assert plain == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-6)
    assert [loss(layers[1:3], repeats) for repeats in (1, 2, 4, 7)] == pytest.approx([plain] * 4, abs=1e-5)
    assert loss(layers[1:2], 4) == pytest.approx(plain, abs=1e-5)
    assert abs(loss(layers[2:4], 2) - plain) > 1e-3 and loss(layers[2:4], 1) == pytest.approx(plain, abs=1e-5)


def test_a_looped_window_is_the_recurrent_model_of_these_layers() -> None:
    recurrent = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 4,
                 "recurrence_step": "mean", "embedding_multiplier": 1.0}  # fmt: skip
    asked = make_model(config=make_config(recursion=recurrent, num_layers=4))
    plain = make_model(config=make_config(recursion={"enable_recursive_refinement": False}, num_layers=4))
    plain.load_state_dict(asked.state_dict())
    ids = make_tokens(2, 12)
    with torch.no_grad(), looped(layers_of(plain)[1:3], 4):
        found = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, asked(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


# --- the command ----------------------------------------------------------------------------------------------------


def layers(*words: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["layers", *words, "--json"])
    return json.loads(said.getvalue())


@pytest.mark.grid
def test_the_command_writes_what_an_import_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_plain(tmp_path / "donor"), tmp_path / "new" / "found.json"
    (tmp_path / "a.jsonl").write_text('{"text": "Once upon a time there was a calibration text."}\n' * 4)
    words = ["--model", str(folder), "--seq-length", "32", "--num-samples", "3", "--loop-windows", "1"]
    record = layers(*words, "--text", str(tmp_path / "a.jsonl"), "--output", str(output))
    assert json.loads(output.read_text()) == record and output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert sorted([*record["prelude"], *record["core"], *record["coda"]]) == [0, 1] and record["version"] == 1
    assert (record["samples"], record["sequence_length"], len(record["layers"])) == (3, 32, 2)
    assert [each["first"] for each in record["loop_windows"]["windows"]] == [0, 1]
    main(["layers", *words, "--output", str(output)])  # on CPython's text
    said = capsys.readouterr().out
    assert "layer  influence  distance  stack" in said and f"--from-analysis {output}" in said and "1-1" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "nowhere.jsonl"], "--text nowhere.jsonl does not exist"),
        (["--seq-length", "64"], "--seq-length 64 must lie between 2 and the 48 positions"),
        (["--num-samples", "0"], "--num-samples must be positive"),
        (["--target-recurrent-size", "3"], "--target-recurrent-size 3 must lie between 1 and"),
        (["--loop-windows", "2"], "--loop-windows asks a model that does not loop yet"),
        (["--output", "found.txt"], "--output found.txt must end with .json"),
    ],
)
def test_mistakes_end_in_a_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = write_recursive(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a calibration text.\n" * 9)
    capsys.readouterr()  # a bar of transformers, where nothing has put it out
    with pytest.raises(SystemExit) as ended:
        main(["layers", "--model", str(folder), "--num-samples", "1", "--text", str(text), *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1, err


def _of_checkpoint(folder: Path) -> list[dict[str, Any]]:
    from megatron_recursive.backends import cpu
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model
    from megatron_recursive.hf.convert.stacks import StackChoice

    cpu.install(on_purpose=True)
    donor = write_plain(folder / "donor")
    plain = ImportOptions({"enable_recursive_refinement": False})
    import_model(str(donor), str(folder / "ckpt"), plain, lambda _: None)
    words = ["--num-samples", "2", "--seq-length", "24", "--loop-windows", "1", "2", "--output", str(folder / "a.json")]
    found = [layers("--model", str(model), *words) for model in (donor, folder / "ckpt")]
    stacks = StackChoice(from_analysis=str(folder / "a.json"))
    report = import_model(str(donor), str(folder / "looped"), ImportOptions(stacks=stacks), lambda _: None)
    return [*found, report.facts["stacks"]]


@pytest.mark.grid
def test_a_checkpoint_gives_the_figures_of_its_donor(tmp_path: Path) -> None:
    ((donor, ckpt, stacks),) = run_distributed(_of_checkpoint, 1, tmp_path, timeout=180)
    assert (donor["kind"], ckpt["kind"]) == ("donor", "checkpoint")
    for a, b in zip(donor["layers"], ckpt["layers"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(donor["loop_windows"]["windows"], ckpt["loop_windows"]["windows"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert donor["core"] == ckpt["core"] and stacks == {name: donor[name] for name in ("prelude", "core", "coda")}
