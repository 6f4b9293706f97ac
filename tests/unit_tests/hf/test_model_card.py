"""What an export is beside its weights: the card, the dtype, the shards, and what saving it again keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.model_card import donor_facts
from megatron_recursive.hf.model import REMOTE_CODE_FILES
from tests.distributed import run_distributed
from tests.unit_tests.hf.donors import save_donor
from tests.unit_tests.hf.test_adapters import tokenizer

KNOBS = {"num_refinement_blocks": 2, "num_latent_refinements": 1}


def _job(donor: Path, ckpt: Path, out: Path) -> dict[str, Any]:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model
    from megatron_recursive.hf.convert.export import export_model

    import_model(str(donor), str(ckpt), ImportOptions(recursion=KNOBS), str)
    return export_model(str(ckpt), str(out), say=str, dtype=torch.bfloat16, shard_bytes=50_000).summary()


def test_an_export_says_what_it_is_and_keeps_it_when_it_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

    donor = save_donor("qwen3", tmp_path / "models--acme--tiny" / "snapshots" / "0")
    tokenizer().save_pretrained(donor)
    (donor / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n")
    (donor / "LICENSE").write_text("as you like")
    (said,) = run_distributed(_job, 1, donor, tmp_path / "ckpt", tmp_path / "out", timeout=200)
    assert said["max_logit_error"] < 1e-5

    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    validate_repo_id(data["base_model"])
    assert data == {"base_model": "acme/tiny", "library_name": "transformers", "pipeline_tag": "text-generation",
                    "license": "other", "license_name": "tiny", "license_link": "LICENSE",
                    "tags": ["recursive-gpt"]}  # fmt: skip
    losses = json.loads((tmp_path / "ckpt" / "conversion.json").read_text())["summary"]["loss"]
    for part in ("# out", "acme/tiny", "goes through 16 in 4 passes", "trust_remote_code=True", 'exit="halting"',
                 "| donor |", f"| imported with recursion | {losses['imported with recursion']:.4f} |"):  # fmt: skip
        assert part in card.text or part in card.content, part
    assert str(tmp_path) not in card.content

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 5 and all(len(load_file(f)) == 1 or f.stat().st_size < 54_000 for f in files)
    assert {n for n, t in tensors.items() if t.dtype != torch.bfloat16} == {"halting_head.weight", "halting_head.bias"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1

    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"

    model = RecursiveGPTForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    monkeypatch.setattr(RecursiveGPTForCausalLM, "_auto_class", "AutoModelForCausalLM")  # a registered class
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == 1
    for name in ("README.md", *REMOTE_CODE_FILES):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_losses_of_a_run_are_those_of_its_last_evaluation_before_the_checkpoint(tmp_path: Path) -> None:
    from megatron_recursive.hf.convert.model_card import Exported, write_card
    from megatron_recursive.plan import RecursionConfig, build_plan

    records = [{"kind": "valid", "iteration": step, "lm loss": 4.0 - step / 100, "lm loss block 1": 4.5,
                "lm loss block 2": 4.0 - step / 100} for step in (10, 20, 30)]  # fmt: skip
    lines = [json.dumps({"kind": "run", "iteration": 0}), *map(json.dumps, records), '{"kind": "val']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "import").mkdir()
    (tmp_path / "import" / "conversion.json").write_text(json.dumps({"summary": {"donor": "tiny", "loss": {"a": 1.0}}}))
    plan = build_plan(RecursionConfig(**KNOBS).resolved(embedding_init_std=1.0))
    args = {"tokenizer_model": str(tmp_path / "import" / "tokenizer"), "load": str(tmp_path)}
    write_card(tmp_path, "out", Exported("RecursiveGPTForCausalLM", True, 2, plan, tmp_path / "iter_0000025", tmp_path,
                                         args, None))  # fmt: skip
    text = (tmp_path / "README.md").read_text()
    assert "held out, at iteration 20" in text and "| block 1 | 4.5000 |\n| block 2 | 3.8000 |" in text
    assert "Donor of the weights: tiny" in text and "Licence: not known" in text and "was not compared" in text


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "no card", "---\nlicense: 3\n---\n", "---\n- a\n---\n"])
def test_a_card_of_others_is_no_obstacle(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert donor_facts(tmp_path) == {"donor": tmp_path.name}


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    from megatron_recursive.hf.convert.export import _Cast
    from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint, TorchDistWriter

    writer = TorchDistWriter(tmp_path / "release")
    for key, value in (("a", 1e5), ("b", 2.0), ("halting_head.bias", 1e5)):
        writer.add(key, torch.full((3,), value))
    writer.close()
    cast = _Cast(TorchDistCheckpoint(tmp_path / "release"), torch.float16)
    assert cast.get("b").dtype == torch.float16 and cast.get("halting_head.bias").dtype == torch.float32
    assert cast.nbytes == 6 + 6 + 12
    with pytest.raises(UserError, match="a of .* holds 100000, more than --dtype float16 can hold"):
        cast.get("a")


def test_a_size_is_read_as_transformers_reads_it() -> None:
    import argparse

    from megatron_recursive.commands.convert import _bytes

    assert [_bytes(text) for text in ("5GB", "1.5 MB", "300", "2kb")] == [5 * 10**9, 1_500_000, 300, 2000]
    for text in ("0", "5GiB", "-1", "big"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 5GB"):
            _bytes(text)
