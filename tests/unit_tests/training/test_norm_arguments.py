"""Norm placement through real (tiny) runs: trained, continued at another layout, refused where it does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.unit_tests.training.runs import copy_checkpoint, losses_of, save_to, train

NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0"]
QK = ["--qk-layernorm", "--qk-norm-scope", "full", "--group-query-attention", "--num-query-groups", "2"]
OLMO2 = [*QK, "--norm-placement", "post", "--normalization", "RMSNorm", "--disable-bias-linear", "--swiglu"]


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmo2")
    assert train(*save_to(folder), *NO_DROPOUT, *OLMO2) is None
    return folder


@pytest.mark.grid
def test_a_run_goes_on_at_another_tensor_parallel_size(olmo2: Path, tmp_path: Path) -> None:
    copy_checkpoint(olmo2, tmp_path, 3)
    tp2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert train(*save_to(tmp_path), *NO_DROPOUT, *OLMO2, *tp2, world_size=2) is None
    whole = losses_of(olmo2)
    assert losses_of(tmp_path) == pytest.approx({i: whole[i] for i in (4, 5, 6)}, rel=1e-5)


def test_a_checkpoint_brings_its_norms_along(olmo2: Path, tmp_path: Path) -> None:
    copy_checkpoint(olmo2, tmp_path, 3)
    assert train(*save_to(tmp_path), *NO_DROPOUT, "--use-checkpoint-args") is None
    whole = losses_of(olmo2)
    assert losses_of(tmp_path) == {i: whole[i] for i in (4, 5, 6)}


def test_a_checkpoint_of_other_norms_is_refused_by_flag(olmo2: Path) -> None:
    sandwich = train(*save_to(olmo2), *OLMO2, "--norm-placement", "sandwich")
    assert sandwich is not None and "--norm-placement post (this run: sandwich)" in sandwich
    per_head = train(*save_to(olmo2), *OLMO2, "--qk-norm-scope", "head")
    assert per_head is not None and "--qk-norm-scope full (this run: head)" in per_head


def refused_beside_transformer_engine() -> list[str]:
    from megatron_recursive.errors import UserError
    from megatron_recursive.training.norm_arguments import refuse_norms

    flags = {"norm_placement": "post", "output_norm_scope": "branch", "qk_norm_scope": "full", "qk_layernorm": True,
             "spec": None, "transformer_impl": "transformer_engine", "apply_wd_to_qk_layernorm": False,
             "use_transformer_engine_op_fuser": False, "norm_weights": "learned", "normalization": "RMSNorm",
             "layernorm_zero_centered_gamma": False}  # fmt: skip
    refuse_norms(argparse.Namespace(**flags))
    said = []
    for change in ({"use_transformer_engine_op_fuser": True}, {"norm_weights": "ones"}):
        with pytest.raises(UserError) as error:
            refuse_norms(argparse.Namespace(**flags | change))
        said.append(str(error.value))
    return said


def test_transformer_engine_has_every_norm() -> None:
    assert run_distributed(refused_beside_transformer_engine, 1)[0] == [
        "--norm-placement post and --use-transformer-engine-op-fuser exclude each other; leave either out.",
        "--norm-weights ones needs --normalization RMSNorm without --qk-layernorm.",
    ]
