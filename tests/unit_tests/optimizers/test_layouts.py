"""Every optimizer moves a recursive model at every layout as in one process, and each weight as it should."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, build_wrapped, train
from tests.unit_tests.models.comparing import worst_error

# Clipped, with an epsilon above rounding errors (models/test_parallel.py says why).
SETTINGS = {"lr": 1e-2, "min_lr": 0.0, "clip_grad": 0.1, "weight_decay": 0.01, "adam_eps": 1e-5, "adam_beta2": 0.95}
EXACT = {"muon_tp_mode": "duplicated", "muon_fp32_matmul_prec": "high"}
LLAMA = {"num_query_groups": 2, "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
CASES = {
    name: Case(optimizer={**SETTINGS, **(EXACT if name == "muon" else {}), "optimizer": name}, steps=3,
               transformer=LLAMA)
    for name in ("muon", "adam_atan2", "ellis_adam")
}  # fmt: skip
LAYOUTS = {
    "PP 2": (2, Layout(pp=2)), "TP 2, PP 2": (4, Layout(tp=2, sequence_parallel=True, pp=2)),
    "DP 2": (2, Layout(ddp={"overlap_grad_reduce": True, "bucket_size": 2000})),
}  # fmt: skip


def train_all(layout: Layout) -> dict[str, Any]:
    return {name: train(case, layout) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return run_distributed(train_all, 1, Layout(), timeout=120)[0]


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=["PP 2"]))
def test_a_layout_moves_weights_as_one_process(serial: dict[str, Any], layout: str) -> None:
    ranks, how = LAYOUTS[layout]
    for rank in run_distributed(train_all, ranks, how, timeout=180):
        for name, mine in rank.items():
            theirs = {key: value for key, value in serial[name].parameters.items() if key in mine.parameters}
            assert mine.gradient_norms == pytest.approx(serial[name].gradient_norms, rel=1e-5)
            error, where = worst_error(mine.parameters, theirs)
            assert error <= 2e-5, (name, where, error)


def groups_of(optimizer: str, factors: dict[str, float], case: Case) -> dict[str, dict[str, Any]]:
    """By weight: its torch optimizer and the settings of its group."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.utils import unwrap_model

    from megatron_recursive.optimizers import registry
    from megatron_recursive.optimizers.parameter_groups import group_overrides

    wrapped = build_wrapped(case, Layout())
    registry.register()
    config = OptimizerConfig(**{**SETTINGS, **EXACT, "optimizer": optimizer, "min_lr": 1e-3})
    ours = group_overrides([unwrap_model(wrapped)], config, factors)
    built = get_megatron_optimizer(config, [wrapped], get_standard_config_overrides(config) | ours)
    names = {parameter: name.removeprefix("module.") for name, parameter in wrapped.named_parameters()}
    return {
        names[parameter]: {"kind": type(each.optimizer).__name__, **{k: v for k, v in group.items() if k != "params"}}
        for each in built.chained_optimizers
        for group in each.optimizer.param_groups
        for parameter in group["params"]
    }


def test_muon_has_the_matrices_of_layers_alone() -> None:
    """Learned positions are a matrix which Megatron itself would give to it."""
    case = Case(model={"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": False})
    adapted = Case(recursion={"recursion_family": "recurrent", "injection": "concat"})
    (groups,) = run_distributed(groups_of, 1, "muon", {}, adapted)
    assert groups["adapter.weight"]["kind"] == "TensorParallelMuon"
    (groups,) = run_distributed(groups_of, 1, "muon", {}, case)
    muon = {name for name, group in groups.items() if group["kind"] == "TensorParallelMuon"}
    ends = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert muon == {name for name in groups if name.startswith("decoder.layers.") and name.endswith(ends)} != set()
    assert {groups[name]["kind"] for name in groups.keys() - muon} == {"AdamW"}
    assert "embedding.position_embeddings.weight" in groups and "halting_head.weight" in groups


def test_rates_and_decay_by_part() -> None:
    (groups,) = run_distributed(groups_of, 1, "adam", {"layers": 0.25, "halting head": 3.0}, Case())
    for name, group in groups.items():
        factor = 0.25 if name.startswith("decoder.") else 3.0 if name.startswith("halting") else 1.0
        assert (group["max_lr"], group["min_lr"]) == (factor * 1e-2, factor * 1e-3), name
        flat = "norm" in name or name.endswith("bias") or name.startswith("halting")
        assert group["wd_mult"] == (0.0 if flat else 1.0), name


def factors_of(knobs: list[dict[str, Any]]) -> list[dict[str, float]]:
    from megatron_recursive.optimizers.parameter_groups import rate_factors
    from megatron_recursive.plan import RecursionConfig, StepPlans, build_plan

    configs = [RecursionConfig(**each).resolved(embedding_init_std=0.02) for each in knobs]
    asked = {"core": 1.0, "adapter": 0.5, "head": 2.0}
    return [rate_factors(plan := build_plan(config), asked, throttle=True, drawn=StepPlans(config, plan).drawn())
            for config in configs]  # fmt: skip


def test_the_throttle_counts_passes_with_gradient() -> None:
    core = {"num_refinement_blocks": 3, "num_latent_refinements": 4, "detach_between_refinements": True}
    recurrent = {"recursion_family": "recurrent", "num_recurrences": 6, "backprop_depth": 4,
                 "injection": "add", "num_prelude_layers": 1, "num_coda_layers": 1}  # fmt: skip
    adapted = {**recurrent, "injection": "concat"}
    drawn = {**recurrent, "num_recurrences": 4, "recurrence_distribution": "uniform"}  # 1 to 7, 4 with gradient
    asked = [core, {**core, "detach_between_refinements": False}, recurrent, adapted, drawn]
    (factors,) = run_distributed(factors_of, 1, asked)
    assert factors == [
        {"layers": 1 / 5, "halting head": 2.0},  # the last block's passes
        {"layers": 1 / 15, "halting head": 2.0},
        {"layers": 1 / 4},  # prelude and coda run once
        {"layers": 1 / 4, "adapter": 0.5},
        {"layers": pytest.approx(7 / (1 + 2 + 3 + 4 * 4))},
    ]
