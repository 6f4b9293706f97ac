"""Layers of a donor as prelude, core and coda: by hand, from a file, as published; and loops written out as layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.stacks import PRESETS, StackChoice, layer_numbers, ranges, stack_knobs
from megatron_recursive.hf.convert.unroll import chain
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from tests.distributed import run_distributed
from tests.unit_tests.hf.donors import save_donor
from tests.unit_tests.hf.recursive_models import make_config, make_model
from tests.unit_tests.hf.test_convert import _export, _import, _quiet
from tests.unit_tests.inference.folders import write_tokenizer


def test_stacks_by_hand_from_a_file_and_as_published(tmp_path: Path) -> None:
    assert StackChoice().read(8) is None
    assert StackChoice("0,2", "4-5,3", "7").read(8) == {"prelude": [0, 2], "core": [4, 5, 3], "coda": [7]}
    assert StackChoice(core="1-6").read(8) == {"prelude": [], "core": [1, 2, 3, 4, 5, 6], "coda": []}
    file = tmp_path / "analysis.json"
    file.write_text(json.dumps({"prelude": [0], "core": [3, 2], "coda": [], "influence": [0.1, 0.2]}))
    assert StackChoice(from_analysis=str(file)).read(4) == {"prelude": [0], "core": [3, 2], "coda": []}
    assert StackChoice(preset="OLMo-2-0425-1B").read(16)["core"] == [*range(6, 12)]
    for name, texts in PRESETS.items():
        size = int(texts[-1].rpartition("-")[2]) + 1
        assert [ranges(layer_numbers(text, "--core", size)) for text in texts] == [*texts]
        assert StackChoice(preset=name).read(size) is not None


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"prelude": "0-3", "core": "3-5"}, "--prelude, --core: layer 3 is in two"),
     ({"core": "2-8"}, "--core 2-8: the model has the layers 0 to 7"), ({"core": "5-2"}, "a range counts up"),
     ({"core": "0-999999999"}, "layers 0 to 7"), ({"core": "1,,2"}, "whole numbers and ranges"),
     ({"core": "1,1"}, "--core 1,1 names a layer twice"), ({"prelude": "0-3", "coda": "7"}, "--core has no layers"),
     ({"preset": "TinyLlama-1.1B"}, "TinyLlama-1.1B: core 10-17: the model has the layers 0 to 7"),
     ({"preset": "TinyLlama-1.1B"}, "is for 22 layers, but this model has 23"),
     ({"preset": "TinyLlama-1.1B", "core": "1"}, "--preset excludes --core"),
     ({"preset": "TinyLlama-1.1B", "from_analysis": "f"}, "--preset excludes --from-analysis"),
     ({"from_analysis": "absent.json"}, "absent.json must be a JSON object"),
     ({"from_analysis": "[1]"}, "must be a JSON object with the lists prelude"),
     ({"from_analysis": '{"prelude": [], "core": [true], "coda": []}'}, "no lists of whole numbers"),
     ({"from_analysis": '{"prelude": [], "core": [0, -1], "coda": []}'}, "core 0,-1 must be whole numbers"),
     ({"from_analysis": '{"prelude": [], "core": [], "coda": []}'}, "core has no layers"),
     ({"from_analysis": '{"prelude": [0], "core": '}, "must be a JSON object")],
)  # fmt: skip
def test_bad_stacks(choice: dict[str, str], said: str, tmp_path: Path) -> None:
    text = choice.get("from_analysis", "")
    if text[:1] in ("[", "{"):
        (tmp_path / "a.json").write_text(text)
        choice = {"from_analysis": str(tmp_path / "a.json")}
    with pytest.raises(UserError, match=said.replace("[", r"\[")) as error:
        StackChoice(**choice).read(23 if "22" in said else 8)
    assert "\n" not in str(error.value)


def test_knobs_that_contradict_the_stacks_are_refused() -> None:
    stacks = {"prelude": [0, 1], "core": [2], "coda": []}
    assert stack_knobs(stacks, {"num_prelude_layers": 2, "num_recurrences": 3})["num_coda_layers"] == 0
    contradicted: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_prelude_layers": 1}, "--num-prelude-layers 1"), ({"num_coda_layers": 2}, "--num-coda-layers 2"),
        ({"recursion_family": "looped"}, "--recursion-family looped contradicts"),
        ({"enable_recursive_refinement": False}, "--enable-recursive-refinement False contradicts"),
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
    assert "--preset" not in said and refused.startswith("--prelude says which layers are kept")
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


# --- unrolled -------------------------------------------------------------------------------------------------------

RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3}
LOOPED = {"recursion_family": "looped", "num_refinement_blocks": 3, "state_norm": "none"}


def _plan(**knobs: Any) -> RecursionPlan:
    return build_plan(RecursionConfig(**knobs).resolved(embedding_init_std=1.0))


@pytest.mark.parametrize(
    ("knobs", "layers"),
    [(RECURRENT, [0, 1, 2, 1, 2, 1, 2, 3]), ({**RECURRENT, "num_coda_layers": 0}, [0, 1, 2, 3] + [1, 2, 3] * 2),
     ({**RECURRENT, "num_recurrences": 1, "recurrence_step": "mean"}, [0, 1, 2, 3]), (LOOPED, [0, 1, 2, 3] * 3),
     ({**LOOPED, "num_refinement_blocks": 1, "state_norm": "final"}, [0, 1, 2, 3]),
     ({"num_refinement_blocks": 1, "num_latent_refinements": 1, "state_norm": "none"}, [0, 1, 2, 3] * 2)],
)  # fmt: skip
def test_chains_of_layers(knobs: dict[str, Any], layers: list[int]) -> None:
    assert chain(_plan(**knobs), 4) == layers


@pytest.mark.parametrize(
    ("knobs", "word"),
    [({**RECURRENT, "boundary": "gate"}, "it has move gate"),
     ({**RECURRENT, "recurrence_step": "mean"}, "moves its state by the step 0.333"),
     ({**RECURRENT, "injection": "add"}, r"pass 2 \(core\) reads output \+ input"),
     ({**RECURRENT, "injection": "concat"}, "it has combine concat"),
     ({**RECURRENT, "state_init": "sampled", "injection": "add"}, r"output \+ input \(state_init sampled\)"),
     ({**RECURRENT, "state_norm": "core-end", "num_recurrences": 1}, "state_norm core-end"),
     ({**LOOPED, "state_norm": "final"}, "state_norm final"),
     ({"state_norm": "none"}, r"pass 2 \(core\) reads output \+ latent \+ input"),
     ({"num_refinement_blocks": 1, "num_latent_refinements": 1, "state_norm": "none", "state_init": "trunc-normal"},
      r"pass 1 \(core\) reads"),
     ({"recursion_family": "hierarchical", "state_norm": "none"}, r"\(low\) reads latent \+ output")],
)  # fmt: skip
def test_what_no_chain_expresses_is_named(knobs: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        chain(_plan(**knobs), 4)


def test_a_word_that_unrolling_does_not_know_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(RecursionPlan):
        gate: str | None = None

    plan = _plan(**LOOPED)
    words = {word.name: getattr(plan, word.name) for word in dataclasses.fields(plan)}
    assert chain(Later(**words), 2) == [0, 1] * 3
    with pytest.raises(UserError, match="it has gate exit"):
        chain(Later(**words, gate="exit"), 2)


def _unrolled(stacked: Path, folder: Path) -> dict[str, Any]:
    """Logits of the checkpoint's export and of three unrolled folders, and what is refused."""
    from transformers import AutoModelForCausalLM

    from megatron_recursive.hf.convert import unroll
    from megatron_recursive.hf.convert.unroll import unroll_model

    found: dict[str, Any] = {"said": []}
    _export(stacked, folder / "hf")
    make_model(config=make_config(recursion=LOOPED, num_layers=3)).save_pretrained(folder / "loops")
    scaled = make_config(recursion={**LOOPED, "embedding_multiplier": 3.0}, num_layers=3, vocab_size=257)
    make_model(config=scaled).to(torch.bfloat16).save_pretrained(folder / "scaled")
    write_tokenizer(folder / "scaled")
    write_tokenizer(folder / "tokenizer", "a neighbour")  # of another model
    (folder / "scaled" / "generation_config.json").write_text('{"exit": "halting", "max_new_tokens": 7}')
    make_model(config=make_config(recursion={**RECURRENT, "injection": "add"}, num_layers=4)).save_pretrained(
        folder / "injected")  # fmt: skip
    for name, src in (("checkpoint", stacked), ("hf", folder / "hf"), ("loops", folder / "loops"),
                      ("scaled", folder / "scaled")):  # fmt: skip
        report = unroll_model(str(src), str(folder / f"{name} unrolled"), say=found["said"].append)
        model = AutoModelForCausalLM.from_pretrained(folder / f"{name} unrolled")
        found[name] = report.max_logit_error, type(model).__name__, model.config.num_hidden_layers
    for name, out in (("injected", "no"), ("hf unrolled", "no"), ("hf", "loops")):
        with pytest.raises(UserError) as error:
            unroll_model(str(folder / name), str(folder / out), say=_quiet)
        found[f"{name} refused"] = str(error.value)
    plain = {"enable_recursive_refinement": False}
    found["again"] = _import(folder / "loops unrolled", folder / "again", recursion=plain)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(UserError) as error:  # the worker lives on
        patched.setattr(unroll, "chain", lambda plan, num_layers: [2, 1, 0] * 3)
        unroll_model(str(folder / "loops"), str(folder / "no"), say=_quiet)
    found["another order"] = str(error.value)
    return found


def test_unrolled_models_are_donors_of_the_same_function(stacked: tuple[Path, Any], tmp_path: Path) -> None:
    (found,) = run_distributed(_unrolled, 1, stacked[0] / "ckpt", tmp_path, timeout=240)
    for name, expected in (("checkpoint", ("Qwen2ForCausalLM", 9)), ("hf", ("Qwen2ForCausalLM", 9)),
                           ("loops", ("LlamaForCausalLM", 9)), ("scaled", ("LlamaForCausalLM", 9))):  # fmt: skip
        assert found[name][0] < 2e-6 and found[name][1:] == expected, (name, found[name])
    assert any("5 layers in 5 passes become 9 layers" in line for line in found["said"])
    assert "left behind: halting_head.weight" in "\n".join(found["said"])
    assert "to a chain of layers: pass 2" in found["injected refused"] and not (tmp_path / "no").exists()
    assert "plain GPT already" in found["hf unrolled refused"] and "exists already" in found["hf refused"]
    unrolled = tmp_path / "scaled unrolled"
    assert json.loads((unrolled / "generation_config.json").read_text()) == {"max_new_tokens": 7, "eos_token_id": 0}
    assert not list(unrolled.glob("chat_template*"))
    assert (unrolled / "tokenizer.json").is_file() and not list(unrolled.glob("*.py"))
    assert found["another order"].startswith("The proof failed")
    assert found["again"]["max_logit_error"] < 2e-6
    assert "converted from the checkpoint `loops`" in (tmp_path / "loops unrolled" / "README.md").read_text()
