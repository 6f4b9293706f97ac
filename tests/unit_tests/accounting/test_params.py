"""Counted parameters against the parameters of built models."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_recursive.accounting import ModelShape, count_parameters
from megatron_recursive.accounting.params import tensor_parallel_parameters
from megatron_recursive.plan import build_plan
from tests.distributed import run_distributed
from tests.models import FFN, HEADS, HIDDEN, LAYERS, SEQ, VOCAB, Case, build_model, start_parallel
from tests.unit_tests.models.options import OPTIONS


def shape_of(case: Case) -> ModelShape:
    """The dimensions in words of the case, not read from the built model."""
    options, model = case.transformer, case.model
    linear_bias = options.get("add_bias_linear", True)
    return ModelShape(
        num_layers=options.get("num_layers", LAYERS),
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=options.get("num_query_groups", HEADS),
        kv_channels=options.get("kv_channels", HIDDEN // HEADS),
        vocab_size=VOCAB,
        seq_length=SEQ,
        learned_positions=SEQ if model.get("position_embedding_type") == "learned_absolute" else 0,
        gated_linear_unit=options.get("swiglu", False),
        tied_embeddings=model.get("share_embeddings_and_output_weights", True),
        linear_bias=linear_bias,
        qkv_bias=options.get("add_qkv_bias", False),
        qk_norm=options.get("qk_layernorm", False),
        qk_norm_full=case.norms.get("qk_norm_scope") == "full",
        attention_gate=options.get("attention_output_gate", False),
        norms_per_layer=4 if case.norms.get("norm_placement") == "sandwich" else 2,
        norm_bias=options.get("normalization", "LayerNorm") == "LayerNorm",
    )


def held_by_models() -> dict[str, dict[str, int]]:
    start_parallel()
    sizes = {}
    for name, case in OPTIONS.items():
        groups = {"layers": 0, "halting_head": 0, "all": 0}
        for parameter_name, parameter in build_model(case).named_parameters():
            group = "layers" if ".layers." in parameter_name else parameter_name.split(".")[0]
            groups[group] = groups.get(group, 0) + parameter.numel()
            groups["all"] += parameter.numel()
        sizes[name] = groups
    return sizes


@cache
def held() -> dict[str, dict[str, int]]:
    return run_distributed(held_by_models, 1)[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_count_is_what_the_model_holds(option: str) -> None:
    case = OPTIONS[option]
    plan = build_plan(case.resolved_recursion())
    count, model = count_parameters(shape_of(case), plan), held()[option]
    assert count.held == model["all"]
    assert (count.layers, count.added) == (model["layers"], model["halting_head"])
    assert count.embedding == model["embedding"]
    assert count.unrolled == count.held + (plan.num_passes - 1) * model["layers"]


@pytest.mark.parametrize(
    ("word", "added"),
    [({"injection": "concat"}, 2 * HIDDEN**2), ({"injection": "diagonal"}, HIDDEN**2 + 2 * HIDDEN),
     ({"boundary": "gate"}, 2 * HIDDEN * -(-HIDDEN // 16) + 2 * HIDDEN), ({"boundary": "norm-inject"}, 0)],
    ids=str,
)  # fmt: skip
def test_what_stands_around_a_core_counts_on_the_first_stage(word: dict[str, str], added: int) -> None:
    knobs = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1}
    case = Case({**knobs, **word}, transformer={"num_layers": 4})
    plan, shape = build_plan(case.resolved_recursion()), shape_of(case)
    none = build_plan(Case({**knobs, "injection": "add"}).resolved_recursion())
    assert count_parameters(shape, plan).added == added
    stages, bare = (tensor_parallel_parameters(shape, each, 2, [2, 2]) for each in (plan, none))
    assert [a - b for a, b in zip(stages, bare, strict=True)] == [added, 0]


def test_unrolled_is_the_plain_model_of_that_depth() -> None:
    """Nothing but the layers is repeated: V L layers, and the heads once."""
    recursive = build_plan(Case().resolved_recursion())
    deep = Case({"enable_recursive_refinement": False}, transformer={"num_layers": LAYERS * recursive.num_passes})
    plain = count_parameters(shape_of(deep), build_plan(deep.resolved_recursion()))
    count = count_parameters(shape_of(Case()), recursive)
    assert plain.unrolled == plain.held == count.unrolled - count.added
