"""From a name in the hub's cache to a checkpoint, over a run on four ranks, and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed import run_command, run_distributed
from tests.quick_start import ALL
from tests.unit_tests.hf.donors import make_donor, tokens
from tests.unit_tests.hf.test_convert import _import
from tests.unit_tests.hf.test_hrm_text import make as make_hrm_text
from tests.unit_tests.hf.test_published_looped import CONFIGS, loops, save
from tests.unit_tests.hf.test_published_recurrent import original, written
from tests.unit_tests.training.runs import in_worker, losses_of, metrics_of, tensors_of

NAME, REVISION = "acme/tiny-qwen2", "0" * 40


def _cache_model(cache: Path) -> None:
    """A model in shards, laid down as a download leaves it."""
    place = cache / f"models--{NAME.replace('/', '--')}"
    make_donor("qwen2").save_pretrained(place / "snapshots" / REVISION, max_shard_size="40KB")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(REVISION)


def _import_as_typed(cache: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "tools/convert_hf.py", "import", *map(str, arguments)]
    result = run_command(command, timeout=240, env={"HF_HUB_CACHE": str(cache)})
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def _there_and_again(run: Path, back: Path, again: Path) -> tuple[dict[str, Any], bool]:
    """Export, import the export: the report of the export, and whether the two checkpoints are one model."""
    from megatron_recursive.hf.convert import donor_import as convert
    from megatron_recursive.hf.convert import export, verify

    report = export.export_model(str(run), str(back), say=str).summary()
    convert.import_model(str(back), str(again), convert.ImportOptions(), str)
    return report, verify.agree(verify.verify(str(run), str(again), say=str))


TRAINING = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --seq-length 32 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 251 --eval-iters 0 --log-interval 1 --num-workers 0"
).split()


@pytest.mark.grid
def test_a_cached_name_in_shards_trains_in_parallel_and_returns(tmp_path: Path) -> None:
    _cache_model(tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > 3
    ckpt, run = tmp_path / "ckpt", tmp_path / "run"
    knobs = ["--num-refinement-blocks", 2, "--num-latent-refinements", 1]
    report = _import_as_typed(tmp_path / "cache", "--hf", NAME, "--out", ckpt, *knobs)
    assert report["max_logit_error"] < 2e-6 and report["new"] == 2 and report["dropped"] == 0

    flags = [*TRAINING, "--train-iters=3", "--save-interval=3"]
    argv = [f"@{ckpt / 'megatron_args.txt'}", *flags, "--load", str(ckpt), "--save", str(run)]
    assert run_distributed(in_worker, 4, argv, mock_documents=ALL, timeout=120) == [None] * 4
    losses = losses_of(run)
    assert list(losses) == [1, 2, 3] and losses[3] < losses[1]
    before, after = tensors_of(ckpt / "release"), tensors_of(run / "iter_0000003")
    for key, start in before.items():  # Adam moves a weight by about the learning rate a step: it started from these
        assert (after[key] - start).abs().max() < 1e-2, key
    key = "embedding.word_embeddings.weight"
    assert (after[key] - before[key]).abs().max() > 0

    ((report, same),) = run_distributed(_there_and_again, 1, run, tmp_path / "hf", tmp_path / "again", timeout=120)
    assert report["max_logit_error"] < 2e-6 and report["family"] == "recursive_gpt" and same


def _export_and_generate(run: Path, back: Path, vocabulary: int) -> tuple[dict[str, Any], list[int], list[int]]:
    import transformers

    from megatron_recursive.hf.convert import export
    from megatron_recursive.inference.megatron_model import open_megatron

    report, ids = export.export_model(str(run), str(back), say=str).summary(), tokens(8)[:1] % vocabulary
    with open_megatron(str(run)) as (megatron, _):
        ours = megatron.generate(ids, max_new_tokens=6, do_sample=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True).eval()
    return report, ours[0].tolist(), model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()


@pytest.mark.grid
def test_hrm_text_trains_in_parallel_and_returns_as_transformers_model(tmp_path: Path) -> None:
    """Over two stages of one stack each, the gradient in windows; weights that are frozen stay what they were."""
    ckpt, run = tmp_path / "ckpt", tmp_path / "run"
    make_hrm_text().save_pretrained(tmp_path / "hf")
    (report,) = run_distributed(_import, 1, tmp_path / "hf", ckpt, timeout=120)
    assert report["family"] == "hrm_text" and report["max_logit_error"] < 2e-6
    flags = [*TRAINING, "--train-iters=2", "--save-interval=2", "--use-distributed-optimizer"]
    argv = [f"@{ckpt / 'megatron_args.txt'}", *flags, "--load", str(ckpt), "--save", str(run)]
    assert run_distributed(in_worker, 4, argv, timeout=120) == [None] * 4
    before, after = tensors_of(ckpt / "release"), tensors_of(run / "iter_0000002")
    frozen = {key for key, start in before.items() if torch.equal(after[key], start)}
    assert frozen == {key for key in before if "norm" in key or key == "initial_latent"} and len(frozen) == 4

    ((report, ours, theirs),) = run_distributed(_export_and_generate, 1, run, tmp_path / "back", 251, timeout=120)
    assert report["family"] == "hrm_text" and report["max_logit_error"] < 2e-6
    assert ours == theirs and len(ours) == 14


def _leave_and_go_back(run: Path, hf: Path, back: Path) -> tuple[list[float], list[int], list[int], set[int]]:
    import transformers

    from megatron_recursive.hf.convert import export
    from megatron_recursive.inference.megatron_model import open_megatron

    ids = torch.randint(0, 61, (1, 8), generator=torch.Generator().manual_seed(3))
    exits = {"max_new_tokens": 6, "do_sample": False, "exit": "quantile", "exit_threshold": 0.6}
    errors = [export.export_model(str(run), str(place), as_published=place == back, say=str).max_logit_error
              for place in (hf, back)]  # fmt: skip
    with open_megatron(str(run)) as (megatron, _):
        ours = megatron.generate(ids, **exits)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True).eval()
    theirs = model.generate(ids, pad_token_id=0, **exits)
    return errors, ours[0].tolist(), theirs[0].tolist(), {*model.last_exit_report.histogram}


@pytest.mark.grid
def test_ouro_trains_on_in_parallel_leaves_by_its_gate_and_returns_as_it_came(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ckpt, run, shape = tmp_path / "ckpt", tmp_path / "run", {"num_hidden_layers": 4, "layer_types": None}
    shape |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10}
    save("ouro", tmp_path / "ouro", **shape)
    report = _import_as_typed(tmp_path, "--hf", tmp_path / "ouro", "--out", ckpt)
    assert report["family"] == "ouro" and report["max_logit_error"] < 2e-5 and not report["new"] + report["dropped"]
    flags = [*TRAINING, "--train-iters=2", "--save-interval=2", "--use-distributed-optimizer", "--vocab-size=61"]
    argv = [f"@{ckpt / 'megatron_args.txt'}", *flags, "--load", str(ckpt), "--save", str(run)]
    assert run_distributed(in_worker, 4, argv, timeout=120) == [None] * 4
    before, after = tensors_of(ckpt / "release"), tensors_of(run / "iter_0000002")
    assert before.keys() <= after.keys() and not any(torch.equal(after[key], start) for key, start in before.items())
    assert {"mean exit loop", "exit entropy", "expected lm loss"} <= metrics_of(run)[2].keys()

    ((errors, ours, theirs, taken),) = run_distributed(
        _leave_and_go_back, 1, run, tmp_path / "hf", tmp_path / "back", timeout=120
    )
    assert max(errors) < 2e-5 and ours == theirs and len(ours) == 14 and len(taken) > 1
    weights, config = load_file(tmp_path / "back" / "model.safetensors"), {**CONFIGS["ouro"], **shape}
    assert weights.keys() == load_file(tmp_path / "ouro" / "model.safetensors").keys()
    assert len(loops(config, weights, torch.tensor([ours]))) == 4


def _as_published(run: Path, out: Path) -> dict[str, Any]:
    from megatron_recursive.hf.convert import export

    return export.export_model(str(run), str(out), as_published=True, say=str).summary()


@pytest.mark.grid
def test_huginn_trains_on_in_parallel_and_generates(tmp_path: Path) -> None:
    """With as many heads as two ranks can share: a core over both stages, and a sampled start."""
    ckpt, run, heads = tmp_path / "ckpt", tmp_path / "run", {"num_attention_heads": 6, "num_key_value_heads": 6}
    source = written("huginn", tmp_path / "huginn", **heads)
    save_file(original("huginn", **heads), source / "model.safetensors")
    report = _import_as_typed(tmp_path, "--hf", source, "--out", ckpt)
    assert report["family"] == "huginn_raven" and report["max_logit_error"] < 2e-5 and not report["new"]
    flags = [*TRAINING, "--train-iters=2", "--save-interval=2", "--use-distributed-optimizer", "--vocab-size=131"]
    argv = [f"@{ckpt / 'megatron_args.txt'}", *flags, "--load", str(ckpt), "--save", str(run)]
    assert run_distributed(in_worker, 4, argv, timeout=120) == [None] * 4
    before, after = tensors_of(ckpt / "release"), tensors_of(run / "iter_0000002")
    assert before.keys() <= after.keys() and not any(torch.equal(after[key], start) for key, start in before.items())

    ((report, ours, theirs),) = run_distributed(_export_and_generate, 1, run, tmp_path / "back", 131, timeout=120)
    assert report["max_logit_error"] < 2e-5 and ours == theirs and len(ours) == 14
    (report,) = run_distributed(_as_published, 1, run, tmp_path / "published", timeout=120)
    assert report["family"] == "huginn_raven" and report["max_logit_error"] < 2e-5
