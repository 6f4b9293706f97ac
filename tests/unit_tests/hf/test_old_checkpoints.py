"""Checkpoints that Megatron-LM 0.12 and 0.15 wrote themselves (tests/old_checkpoints) give their own logits here."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_recursive.errors import UserError
from tests.distributed import REPOSITORY, run_distributed
from tests.unit_tests.training.runs import PLAIN, RECURSION, train

OLD = REPOSITORY / "tests" / "old_checkpoints"
VERSIONS = ["0.12", "0.15"]
SHORT = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 0 --mock-data --split 98,1,1 "
    "--tokenizer-type NullTokenizer --vocab-size 61 --eval-iters 0 --num-workers 0 --save-interval 1"
).split()


def _export_and_run(folder: Path) -> list[tuple[float, dict[str, Any]]]:
    from transformers import AutoModelForCausalLM

    from megatron_recursive.hf.convert.export import export_model

    found = []
    for version in VERSIONS:
        report = export_model(str(OLD / version), str(folder / version), say=lambda _: None)
        expected = load_file(OLD / version / "logits.safetensors")
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder / version)(expected["tokens"]).logits
        theirs = expected["logits"][..., : logits.shape[-1]]
        found.append((float((logits - theirs).abs().max() / theirs.abs().max()), report.summary()))
    return found


def test_exports_of_old_checkpoints_give_the_logits_of_the_megatron_that_wrote_them(tmp_path: Path) -> None:
    """An epsilon of 1e-3 is in it, which 0.12 and 0.15 store as norm_epsilon."""
    (found,) = run_distributed(_export_and_run, 1, tmp_path, timeout=200)
    for error, summary in found:
        assert error < 2e-6, found
        assert summary["family"] == "llama" and summary["max_logit_error"] < 2e-6


def _of_a_donor(version: str, folder: Path, model_type: str) -> Path:
    """The checkpoint, as if it had been imported from a model of that type."""
    shutil.copytree(OLD / version, folder)
    common = torch.load(folder / "iter_0000002" / "common.pt", weights_only=True)
    common["args"].donor_model_type = model_type
    torch.save(common, folder / "iter_0000002" / "common.pt")
    return folder


@pytest.mark.grid
@pytest.mark.parametrize("version", VERSIONS)
def test_training_starts_from_an_old_checkpoint(version: str, tmp_path: Path) -> None:
    from megatron_recursive.hf.convert.export import open_checkpoint
    from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint, iteration_folder

    start = ["--init-from-gpt", str(_of_a_donor(version, tmp_path / "old", "mistral"))]
    recursion = PLAIN if version == "0.12" else RECURSION
    wrong = train(*start, "--vocab-size", "61", recursion=recursion)
    assert wrong is not None and "--norm-epsilon 0.001 (this run: 1e-05)" in wrong
    flags = [*SHORT, "--save", tmp_path / "run"]
    assert train(*start, "--use-checkpoint-args", *flags, recursion=recursion, flags=()) is None
    old = TorchDistCheckpoint(iteration_folder(OLD / version))
    new = TorchDistCheckpoint(iteration_folder(tmp_path / "run"))
    assert new.arguments()["layernorm_epsilon"] == old.arguments()["layernorm_epsilon"] == 1e-3
    for key in old.shapes:
        assert torch.equal(old.get(key), new.get(key)), key
    family = open_checkpoint(str(tmp_path / "run")).family.model_type
    assert family == ("mistral" if version == "0.12" else "recursive_gpt")


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (shutil.rmtree, ("/nowhere",))


def test_an_index_or_arguments_that_would_run_code_are_refused(tmp_path: Path) -> None:
    from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint

    folder = tmp_path / "iter_0000002"
    shutil.copytree(OLD / "0.15" / folder.name, folder)
    torch.save({"args": _Runs()}, folder / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is damaged .*shutil\.rmtree"):
        TorchDistCheckpoint(folder).arguments()
    (folder / ".metadata").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(UserError, match=r"may not hold shutil\.rmtree"):
        TorchDistCheckpoint(folder)
