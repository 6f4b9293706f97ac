"""Layers of a donor as prelude, core and coda: by hand, from a file, as published; and loops written out as layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.stacks import PRESETS, StackChoice, layer_numbers, published, ranges, stack_knobs
from tests.distributed import run_distributed
from tests.unit_tests.hf.donors import save_donor


def test_stacks_by_hand_from_a_file_and_as_published(tmp_path: Path) -> None:
    assert StackChoice().read(8) is None
    assert StackChoice("0,2", "4-5,3", "7").read(8) == {"prelude": [0, 2], "core": [4, 5, 3], "coda": [7]}
    assert StackChoice(core="1-6").read(8) == {"prelude": [], "core": [1, 2, 3, 4, 5, 6], "coda": []}
    file = tmp_path / "analysis.json"
    file.write_text(json.dumps({"prelude": [0], "core": [3, 2], "coda": [], "influence": [0.1, 0.2]}))
    assert StackChoice(from_analysis=str(file)).read(4) == {"prelude": [0], "core": [3, 2], "coda": []}
    assert StackChoice(preset="OLMo-2-0425-1B").read(16)["core"] == [*range(6, 12)]
    for name, texts in PRESETS.items():
        (size,) = {each for each in range(40) if name in published(f"org/{name}-step3", each)}
        assert [ranges(layer_numbers(text, "--core", size)) for text in texts] == [*texts]
        assert StackChoice(preset=name).read(size) is not None
    assert published("org/Qwen3-0.6B", 22) == []


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"prelude": "0-3", "core": "3-5"}, "--core has layer 3, which prelude has already"),
     ({"core": "2-8"}, "--core 2-8: the model has the layers 0 to 7"), ({"core": "5-2"}, "a range counts up"),
     ({"core": "0-999999999"}, "layers 0 to 7"), ({"core": "1,,2"}, "whole numbers and ranges"),
     ({"core": "1,1"}, "--core 1,1 names a layer twice"), ({"prelude": "0-3", "coda": "7"}, "--core has no layers"),
     ({"preset": "TinyLlama-1.1B"}, "is for 22 layers; this model has 8"),
     ({"preset": "TinyLlama-1.1B", "core": "1"}, "--preset excludes --core"),
     ({"preset": "TinyLlama-1.1B", "from_analysis": "f"}, "--preset excludes --from-analysis"),
     ({"from_analysis": "absent.json"}, "absent.json cannot be read"),
     ({"from_analysis": "[1]"}, "has no list of whole numbers 'prelude'"),
     ({"from_analysis": '{"prelude": [], "core": [true], "coda": []}'}, "whole numbers 'core'"),
     ({"from_analysis": '{"prelude": [], "core": [0, -1], "coda": []}'}, "core has layer -1"),
     ({"from_analysis": '{"prelude": [], "core": [], "coda": []}'}, "core has no layers"),
     ({"from_analysis": '{"prelude": [0], "core": '}, "cannot be read")],
)  # fmt: skip
def test_bad_stacks(choice: dict[str, str], said: str, tmp_path: Path) -> None:
    text = choice.get("from_analysis", "")
    if text[:1] in ("[", "{"):
        (tmp_path / "a.json").write_text(text)
        choice = {"from_analysis": str(tmp_path / "a.json")}
    with pytest.raises(UserError, match=said.replace("[", r"\[")) as error:
        StackChoice(**choice).read(8)
    assert "\n" not in str(error.value)


def test_knobs_that_contradict_the_stacks_are_refused() -> None:
    stacks = {"prelude": [0, 1], "core": [2], "coda": []}
    assert stack_knobs(stacks, {"num_prelude_layers": 2, "num_recurrences": 3})["num_coda_layers"] == 0
    contradicted: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_prelude_layers": 1}, "--num-prelude-layers 1"), ({"num_coda_layers": 2}, "coda layers 0"),
        ({"recursion_family": "looped"}, "--recursion-family looped contradicts"),
        ({"enable_recursive_refinement": False}, "--disable-recursive-refinement contradicts"),
    )  # fmt: skip
    for given, said in contradicted:
        with pytest.raises(UserError, match=said):
            stack_knobs(stacks, given)


# --- an import, and its line that trains on -------------------------------------------------------------------------


def _stacked(folder: Path) -> tuple[dict[str, Any], str, str]:
    """Import seven layers as 0-1 | 4, 3 | 6, and what is said; with --layers besides, what is refused."""
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    said: list[str] = []
    choice = StackChoice("0-1", "4,3", "6")
    knobs = {"recurrence_step": "1", "num_recurrences": 3}
    donor, ckpt = str(folder / "TinyLlama-1.1B"), str(folder / "ckpt")
    summary = import_model(donor, ckpt, ImportOptions(knobs, stacks=choice), said.append).summary()
    with pytest.raises(UserError) as error:
        import_model(donor, str(folder / "no"), ImportOptions(layers="0", stacks=choice), said.append)
    return summary, "\n".join(said), str(error.value)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("stacked")
    save_donor("qwen2, tied", folder / "TinyLlama-1.1B", num_hidden_layers=7)
    return folder, run_distributed(_stacked, 1, folder, timeout=200)[0]


def test_an_import_takes_its_layers_in_the_order_of_the_stacks(stacked: tuple[Path, Any]) -> None:
    folder, (summary, said, refused) = stacked
    assert summary["layers"] == [0, 1, 4, 3, 6] and summary["max_logit_error"] < 2e-6
    assert summary["stacks"] == {"prelude": [0, 1], "core": [4, 3], "coda": [6]} and summary["left_out"] == [2, 5]
    assert "recursion: recurrent, layers prelude 0-1, core 4,3, coda 6" in said and "left out: layers 2,5" in said
    assert "--preset" not in said and refused.startswith("--prelude excludes --layers")
    stored = json.loads((folder / "ckpt" / "conversion.json").read_text())["summary"]
    assert stored["left_out"] == [2, 5] and stored["stacks"]["core"] == [4, 3]


def test_its_line_trains_on(stacked: tuple[Path, Any], tmp_path: Path) -> None:
    from tests.unit_tests.training.runs import in_worker, tensors_of

    ckpt = stacked[0] / "ckpt"
    flags = ("--lr 0 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --num-workers 0 --train-iters 1 "
             "--save-interval 1 --seq-length 32").split()  # fmt: skip
    argv = [f"@{ckpt / 'megatron_args.txt'}", *flags, f"--load={ckpt}", f"--save={tmp_path}"]
    assert run_distributed(in_worker, 1, argv, timeout=120) == [None]
    before, after = tensors_of(ckpt / "release"), tensors_of(tmp_path / "iter_0000001")
    assert all(torch.equal(before[key], after[key]) for key in before)
