"""Conversion there and back, against transformers, for every family and every option of our own model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.report import Report, few
from tests.distributed import run_command, run_distributed
from tests.grids import grid
from tests.unit_tests.hf.donors import DONORS, LAYERS, VOCAB, make_donor, save_donor, tokens

DISABLED = {"enable_recursive_refinement": False}
SMALL = {"num_refinement_blocks": 2, "num_latent_refinements": 2}


def _quiet(_: str) -> None:
    pass


def _import(hf: Path, out: Path, **options: Any) -> dict[str, Any]:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    return import_model(str(hf), str(out), ImportOptions(**options), _quiet).summary()


def _export(ckpt: Path, out: Path) -> dict[str, Any]:
    from megatron_recursive.hf.convert.export import export_model

    return export_model(str(ckpt), str(out), say=_quiet).summary()


def _there_and_back(kind: str, folder: Path) -> dict[str, Any]:
    """Import, export, import again: plain (the donor's class) and recursive (ours)."""
    from megatron_recursive.hf.convert.verify import agree, verify

    donor = save_donor(kind, folder / "donor")
    found: dict[str, Any] = {}
    for name, knobs in (("plain", DISABLED), ("recursive", {**SMALL, "state_init": "trunc-normal"})):
        place = folder / name
        found[name] = _import(donor, place / "first", recursion=knobs)
        found[name + " export"] = _export(place / "first", place / "hf")
        _import(place / "hf", place / "second", recursion=knobs if name == "plain" else {})
        found[name + " same"] = agree(verify(str(place / "first"), str(place / "second"), say=_quiet))
    found["donor same"] = agree(verify(str(donor), str(folder / "plain" / "first"), say=_quiet))
    return found


@pytest.mark.parametrize("kind", grid(DONORS, quick=["llama3, head_dim", "olmo2"]))
def test_every_family_there_and_back(kind: str, tmp_path: Path) -> None:
    (found,) = run_distributed(_there_and_back, 1, kind, tmp_path, timeout=300)
    tensors = len(json.loads((tmp_path / "plain/first/conversion.json").read_text())["tensors"])
    assert found["plain"]["copied"] == tensors and found["plain"]["new"] == found["plain"]["dropped"] == 0
    assert found["recursive"]["copied"] == tensors and found["recursive"]["new"] == 4
    assert found["plain export"]["family"] == DONORS[kind][0]
    assert found["recursive export"]["family"] == "recursive_gpt"
    for name in ("plain", "recursive", "plain export", "recursive export"):
        assert found[name]["max_logit_error"] < 2e-6, (name, found[name])
    assert found["plain same"] and found["recursive same"] and found["donor same"]


def _option_there_and_back(name: str, folder: Path) -> tuple[float, float, bool]:
    from megatron_recursive.hf.convert.verify import agree, verify
    from tests.unit_tests.hf.recursive_models import SHAPES, make_model

    shape = {"tie_word_embeddings": False, **SHAPES[name]}
    make_model(2, 1, {"state_norm": "none"}, **shape).save_pretrained(folder / "hf")
    first = _import(folder / "hf", folder / "ckpt")
    second = _export(folder / "ckpt", folder / "back")
    same = agree(verify(str(folder / "hf"), str(folder / "back"), say=_quiet))
    return first["max_logit_error"], second["max_logit_error"], same


def _without_recursion(folder: Path) -> tuple[list[str], float]:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model
    from tests.unit_tests.hf.recursive_models import make_model

    model, said = make_model(2, 1), list[str]()
    model.save_pretrained(folder / "hf")
    import_model(str(folder / "hf"), str(folder / "ckpt"), ImportOptions(recursion=DISABLED), said.append)
    return [line for line in said if "WARNING: without" in line], model.config.recursion_plan.embedding_multiplier


def test_a_model_of_ours_without_its_recursion_loses_the_factor_on_its_embedding(tmp_path: Path) -> None:
    (((warning,), factor),) = run_distributed(_without_recursion, 1, tmp_path)
    assert factor > 1 and f"the embedding is not multiplied by {factor:g} any more" in warning


def _shapes() -> list[str]:
    from tests.unit_tests.hf.recursive_models import SHAPES

    return list(SHAPES)


@pytest.mark.parametrize("name", grid(_shapes(), quick=["odd heads", "learned positions", "sandwich",
                                                       "gated, norms without weights"]))  # fmt: skip
def test_every_option_of_our_own_model_there_and_back(name: str, tmp_path: Path) -> None:
    ((first, second, same),) = run_distributed(_option_there_and_back, 1, name, tmp_path, timeout=300)
    assert first < 2e-6 and second < 2e-6 and same


# --- Megatron loads what was written ----------------------------------------------------------------------------------


def _loaded_logits(ckpt: Path, tp: int, pp: int) -> Tensor | None:
    """Logits [B, S, true V] of the checkpoint in Megatron's own loader, at a layout; None off the last stage."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_recursive.hf.convert import proof
    from megatron_recursive.hf.convert.export import open_checkpoint
    from megatron_recursive.models.checkpoint_keys import reading_checkpoint
    from tests.models import start_parallel

    start_parallel(tp, pp)
    opened = open_checkpoint(str(ckpt))
    model = proof.build_megatron(opened.arch, opened.recursion, torch.float32, tp, pp).eval()
    with reading_checkpoint():
        state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(opened.checkpoint.folder))
    model.load_state_dict(loaded["model"], strict=False)
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        if pp > 1 and not parallel_state.is_pipeline_first_stage():
            received = torch.empty(ids.shape[1], ids.shape[0], opened.arch.hidden_size)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        result = model(ids, positions, None)
        if pp > 1 and not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(result.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        if tp > 1:
            result = gather_from_tensor_model_parallel_region(result)
    return result[..., :VOCAB]


@pytest.mark.parametrize(
    ("kind", "tp", "pp"),
    grid([("llama3, head_dim", 2, 1), ("llama3, head_dim", 1, 2), ("qwen2, tied", 1, 2), ("qwen2, tied", 2, 1),
          ("olmo2", 2, 1)], quick=[("olmo2", 2, 1)]),
)  # fmt: skip
def test_a_converted_checkpoint_in_a_layout_gives_transformers_logits(
    kind: str, tp: int, pp: int, tmp_path: Path
) -> None:
    groups = {"num_key_value_heads": 2}  # which two ranks can share
    save_donor(kind, tmp_path / "hf", **groups)
    run_distributed(_import, 1, tmp_path / "hf", tmp_path / "ckpt", recursion=DISABLED, timeout=200)
    results = run_distributed(_loaded_logits, 2, tmp_path / "ckpt", tp, pp, timeout=200)
    with torch.no_grad():
        reference = make_donor(kind, **groups)(tokens()).logits
    answers = [each for each in results if each is not None]
    assert len(answers) == tp  # the ranks of the last stage
    for logits in answers:
        assert float((logits - reference).abs().max() / reference.abs().max()) < 2e-6


# --- which layers, which head -----------------------------------------------------------------------------------------


def test_chosen_layers_are_copied_and_the_others_reported(tmp_path: Path) -> None:
    donor = save_donor("qwen3", tmp_path / "hf")
    options = {"selection": "uniform", "num_layers": 2, "recursion": SMALL}
    (summary,) = run_distributed(_import, 1, donor, tmp_path / "ckpt", timeout=200, **options)
    lines = {line["tensor"]: line for line in json.loads((tmp_path / "ckpt/conversion.json").read_text())["tensors"]}
    assert summary["layers"] == [0, LAYERS - 1] and summary["max_logit_error"] < 2e-6
    assert summary["dropped"] == 2 * 11 and lines["model.layers.1.mlp.up_proj.weight"]["status"] == "dropped"
    assert lines["model.layers.3.mlp.up_proj.weight"]["note"] == "decoder.layers.mlp.linear_fc1.weight[1]"


def test_untied_embeddings_start_as_copies_and_bf16_stays_bf16(tmp_path: Path) -> None:
    from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint

    donor = save_donor("qwen2, tied", tmp_path / "hf", torch.bfloat16)
    (summary,) = run_distributed(_import, 1, donor, tmp_path / "ckpt", untie=True, recursion=DISABLED, timeout=200)
    checkpoint = TorchDistCheckpoint(tmp_path / "ckpt" / "release")
    embedding = checkpoint.get("embedding.word_embeddings.weight")
    assert summary["new"] == 1 and embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, checkpoint.get("output_layer.weight")) and not embedding[VOCAB:].any()


# --- where it runs ----------------------------------------------------------------------------------------------------

# A machine with a GPU for Megatron, whose tensors are on "meta": torch refuses to compute with one of those and one of
# the CPU.
BESIDE_A_GPU = """
import sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: torch.device("meta")
from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.report import Report, few
from megatron_recursive.hf.convert.proof import megatron_logits
try:
    megatron_logits(None, None, None, None, None)
except UserError as error:
    print(error)
donor, checkpoint, out = sys.argv[1:]
main(["convert", "import", "--hf", donor, "--out", checkpoint])
main(["convert", "export", "--ckpt", checkpoint, "--out", out])
main(["convert", "verify", checkpoint, out])
"""


@pytest.mark.grid
def test_a_conversion_runs_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path) -> None:
    donor = save_donor("llama3, head_dim", tmp_path / "donor")
    result = run_command([sys.executable, "-c", BESIDE_A_GPU, donor, tmp_path / "ckpt", tmp_path / "hf"], timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert "call backends.cpu.install(on_purpose=True)" in result.stdout.splitlines()[0]
    assert len(reports) == 3 and all(report["max_logit_error"] < 2e-6 for report in reports)
# --- YaRN -------------------------------------------------------------------------------------------------------------


def _yarn_of_training_and_cache(run: Path, donor: Path, back: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """What training sets in Megatron's config of the run's arguments, what the proof sets, and cached decoding."""
    from argparse import Namespace

    from megatron.training.argument_utils import _apply_yarn_config_from_args

    from megatron_recursive.hf.convert import proof
    from megatron_recursive.hf.convert.verify import agree, verify
    from megatron_recursive.inference.megatron_model import open_megatron
    from megatron_recursive.inference.pass_contexts import PassContexts

    _export(run, back)
    assert agree(verify(str(donor), str(back), say=_quiet))
    config, ids = Namespace(), tokens(60)
    with open_megatron(str(run)) as (model, opened), torch.no_grad():
        _apply_yarn_config_from_args(config, Namespace(**opened.args))
        ours = {name: value for name, value in vars(model.megatron.config).items() if name.startswith("yarn_")}
        full, contexts = model(ids).logits, PassContexts(60, 1)
        parts = [model(ids[:, a:b], past_key_values=contexts).logits for a, b in ((0, 20), (20, 21), (21, 60))]
        return vars(config), ours, proof.relative_error(full, torch.cat(parts, 1))


@pytest.mark.grid
def test_a_yarn_donor_trains_and_comes_back(tmp_path: Path) -> None:
    from tests.unit_tests.training.runs import in_worker

    donor = save_donor("qwen3, yarn", tmp_path / "donor")
    values = json.loads((donor / "config.json").read_text())
    old = {"type": "yarn", **values.pop("rope_parameters")}  # as most of the hub's folders say it
    del old["rope_type"], old["rope_theta"]
    (donor / "config.json").write_text(json.dumps({**values, "rope_scaling": old, "rope_theta": 10000.0}))
    run_distributed(_import, 1, donor, tmp_path / "ckpt", recursion=DISABLED)
    flags = ("--lr 0 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --num-workers 0 --train-iters 1 "
             "--save-interval 1 --seq-length 32").split()  # fmt: skip
    argv = [f"@{tmp_path / 'ckpt/megatron_args.txt'}", *flags, f"--load={tmp_path / 'ckpt'}", f"--save={tmp_path}"]
    assert run_distributed(in_worker, 1, argv, timeout=120) == [None]
    ((trained, ours, error),) = run_distributed(_yarn_of_training_and_cache, 1, tmp_path, donor, tmp_path / "back")
    assert trained == ours and len(ours) == 7 and error < 2e-6
    rope = json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(1.25) and rope["rope_type"] == "yarn"
    kept = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
    assert {name: rope[name] for name in kept} == {name: old[name] for name in kept}


# --- the proof fails when it should -----------------------------------------------------------------------------------


def _sabotaged(donor: Path, out: Path, dtype: str) -> str:
    """An import whose table swaps gate and up: it would train, and be another model."""
    from megatron_recursive.hf.convert import mappings, transforms
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    swapped = transforms.Transform("swapped", lambda parts, _: torch.cat([parts[1], parts[0]]), lambda t, _: (t, t))
    family = mappings.FAMILIES["qwen3"]
    rows = tuple(
        mappings.Row(row.megatron, swapped, row.hf) if "linear_fc1.weight" in row.megatron else row
        for row in family.layer_rows
    )
    mappings.FAMILIES["qwen3"] = dataclasses.replace(family, layer_rows=rows)
    try:
        import_model(str(donor), str(out), ImportOptions(proof_dtype=getattr(torch, dtype)), _quiet)
    except UserError as error:
        return str(error)
    finally:
        mappings.FAMILIES["qwen3"] = family
    return "no error"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_table_fails_the_proof_and_leaves_nothing(dtype: str, tmp_path: Path) -> None:
    donor = save_donor("qwen3", tmp_path / "hf")
    (message,) = run_distributed(_sabotaged, 1, donor, tmp_path / "out" / "ckpt", dtype, timeout=200)
    assert "The proof failed" in message and "nothing was written" in message
    assert list((tmp_path / "out").iterdir()) == []


def _errors_by_row(donor: Path) -> list[list[float]]:
    """Of the proof's three rows: the model, and the same with another scaling of its rotary frequencies."""
    from megatron_recursive.hf.convert import proof
    from megatron_recursive.hf.convert.donor_import import checkpoint_fetch
    from megatron_recursive.hf.convert.sources import open_source
    from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint
    from megatron_recursive.plan import RecursionConfig

    _import(donor, donor.with_name("ckpt"), recursion=DISABLED, proof_dtype=None)
    source, plain = open_source(str(donor)), RecursionConfig(**DISABLED).resolved(embedding_init_std=1.0)
    text = proof.proof_text(VOCAB, None, source.arch.max_positions)
    fetch = checkpoint_fetch(TorchDistCheckpoint(donor.with_name("ckpt") / "release"))
    theirs = proof.hf_logits(source.family, source.config, source.weight, text, torch.float32)
    wrong = dataclasses.replace(source.arch, llama3_factor=8.0)
    ours = [proof.megatron_logits(arch, plain, fetch, text, torch.float32) for arch in (source.arch, wrong)]
    return [[proof.relative_error(theirs[row], each[row]) for row in range(3)] for each in ours]


def test_the_proof_reaches_over_the_whole_scaling_of_positions(tmp_path: Path) -> None:
    """Llama 3's scaling acts on distances that 48 tokens side by side do not have: another factor passed the proof."""
    donor = save_donor("llama3, head_dim", tmp_path / "hf", head_dim=64, max_position_embeddings=131072)
    ((right, wrong),) = run_distributed(_errors_by_row, 1, donor, timeout=200)
    assert max(right) < 2e-6 and wrong[0] < 1e-4 and wrong[1] < 1e-4 and wrong[2] > 1e-2, (right, wrong)


def _with_a_flipped_bit(donor: Path, ckpt: Path) -> list[str]:
    from megatron_recursive.hf.convert.verify import verify
    from megatron_recursive.inference.loading import open_model

    _import(donor, ckpt, recursion=DISABLED, proof_dtype=None)
    raw = bytearray((ckpt / "release/__0_0.distcp").read_bytes())
    raw[len(raw) // 2] ^= 1
    (ckpt / "release/__0_0.distcp").write_bytes(raw)
    said = []
    for use in (lambda: _export(ckpt, ckpt / "hf"), lambda: verify(str(ckpt), str(donor), say=_quiet),
                lambda: open_model(str(ckpt)).__enter__()):  # fmt: skip
        try:
            use()
            said.append("taken")
        except UserError as error:
            said.append(str(error))
    return said


def test_an_imported_checkpoint_with_a_flipped_bit_is_not_used(tmp_path: Path) -> None:
    donor = save_donor("qwen3", tmp_path / "hf")
    (said,) = run_distributed(_with_a_flipped_bit, 1, donor, tmp_path / "ckpt", timeout=200)
    assert all("release/__0_0.distcp is damaged" in each and "no other good checkpoint" in each for each in said), said
    assert not (tmp_path / "ckpt" / "hf").exists()


def test_words_count_as_the_json_does_and_tell_how_many_are_not_named() -> None:
    report = Report()
    for status, count in (("copied", 12), ("split", 4), ("new", 8)):
        for number in range(count):
            report.add(status, f"{status}{number}", "why")
    first, *_, last = report.describe().splitlines()
    assert (first, last) == ("16 copied (4 of them split), 8 new", "  new: 2 more") and report.summary()["copied"] == 16
    assert report.describe("DIR/conversion.json").endswith("\n  new: 2 more, listed in DIR/conversion.json")
    assert few("different", list("abcdefg"))[5:] == ["  different: f", "  different: 1 more"]


def _compare_changed(donor: Path, ckpt: Path, folder: Path) -> tuple[Any, ...]:
    from safetensors.torch import load_file, save_file

    from megatron_recursive.hf.convert.verify import agree, verify

    _import(donor, ckpt, recursion=DISABLED)
    _export(ckpt, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.2.self_attn.k_proj.weight"][0, 0] += 0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify(str(ckpt), str(folder), say=_quiet)
    heard: list[str] = []
    cast = verify(str(ckpt), str(save_donor("qwen3", folder.with_name("bf16"), torch.bfloat16)), say=heard.append)
    return agree(report), report.summary(), agree(cast), cast.summary(), heard


def test_verify_names_one_changed_number_and_compares_dtypes_at_the_coarser(tmp_path: Path) -> None:
    donor = save_donor("qwen3", tmp_path / "hf")
    ((same, summary, cast_same, cast, heard),) = run_distributed(
        _compare_changed, 1, donor, tmp_path / "ckpt", tmp_path / "changed", timeout=200
    )
    assert not same and summary["different"] == 1 and summary["max_logit_error"] > 1e-6
    assert cast_same and cast["copied"] > 20 and cast["different"] == 0 and cast["max_logit_error"] < 2e-6
    assert f"{cast['copied']} tensors are float32 in {tmp_path}/ckpt and bfloat16 in {tmp_path}/bf16" in heard[0]
