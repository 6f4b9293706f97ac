"""The local layer spec's attention and norm against Megatron's own and against their formulas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.models import HEADS, SEQ, Case, Layout, build_model, document_mask, start_parallel, transformer_config
from tests.unit_tests.models.comparing import relative_error

BATCH, HEAD_DIM = 2, 8


def make_qkv(groups: int, batch: int = BATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SEQ, batch, n, HEAD_DIM, generator=generator, requires_grad=True)
            for n in (HEADS, groups, groups)]  # fmt: skip


def make_attention(kind: str, groups: int, dropout: float = 0.0) -> Any:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_recursive.models.layer_specs import SDPACoreAttention

    case = Case(transformer={"num_query_groups": groups, "attention_dropout": dropout})
    cls = {"megatron": DotProductAttention, "ours": SDPACoreAttention}[kind]
    return cls(transformer_config(case, Layout()), 1, AttnMaskType.causal, "self")


def attend(kind: str, groups: int, mask: Tensor | None) -> list[Tensor]:
    """The context, and the gradients of a fixed weighted sum of it."""
    qkv = make_qkv(groups)
    context = make_attention(kind, groups)(*qkv, mask)
    weights = torch.randn(context.shape, generator=torch.Generator().manual_seed(6))
    return [context.detach(), *torch.autograd.grad((context * weights).sum(), qkv)]


def compare_with_megatron() -> list[tuple[str, float]]:
    start_parallel()
    masks = {"none": None, "documents": document_mask(BATCH, SEQ, 5), "one for all": document_mask(1, SEQ, 9)}
    errors = []
    for groups, (name, mask) in itertools.product((HEADS, 2, 1), masks.items()):
        pairs = zip(attend("ours", groups, mask), attend("megatron", groups, mask), strict=True)
        errors.append((f"{groups} groups, mask {name}", max(relative_error(mine, theirs) for mine, theirs in pairs)))
    return errors


def test_attention_equals_megatrons() -> None:
    for what, error in run_distributed(compare_with_megatron, 1)[0]:
        assert error <= 1e-5, what


def fused_errors() -> list[float]:
    """The calls that a GPU gets, by the fused kernel that torch has for CPUs too."""
    from megatron_recursive.models.layer_specs import fused_attention

    errors = []
    for groups, mask, dtype in itertools.product((HEADS, 2), (None, document_mask(BATCH, SEQ, 5)),
                                                 (torch.float32, torch.bfloat16, torch.float64)):  # fmt: skip
        query, key, value = (each.detach().to(dtype).permute(1, 2, 0, 3) for each in make_qkv(groups))
        visible = None if mask is None else ~mask
        options = {"is_causal": mask is None, "enable_gqa": groups != HEADS, "attn_mask": visible}
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        errors.append(relative_error(fused_attention(query, key, value, **options), expected))
    return errors


def test_fused_attention_is_attention() -> None:
    assert max(run_distributed(fused_errors, 1)[0]) <= 1e-2  # bf16


def choose_fusions(works: bool) -> tuple[dict[str, bool], bool, float]:
    """Megatron's compiled fusions in a config, whether rotary positions are compiled, and the activation of 1."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_recursive.models import compiled_fusions as fusions

    compile_, eager = torch.compile, getattr(rope_utils, fusions.ROTARY)
    vars(rope_utils).pop(f"{fusions.ROTARY}_eager", None)
    fusions.compiles.cache_clear()
    torch.compile = (lambda function: lambda *args: function(*args)) if works else no_compiler
    try:
        config = transformer_config(Case(transformer={"bias_activation_fusion": True}), Layout())
        fusions.choose(config)
        return ({flag: getattr(config, flag) for flag in fusions.COMPILED_BY_MEGATRON},
                getattr(rope_utils, fusions.ROTARY) is not eager, float(config.activation_func(torch.ones(())))
                )  # fmt: skip
    finally:
        torch.compile = compile_
        setattr(rope_utils, fusions.ROTARY, eager)
        vars(rope_utils).pop(f"{fusions.ROTARY}_eager", None)
        fusions.compiles.cache_clear()


def no_compiler(function: Any) -> Any:
    raise RuntimeError("Failed to find C compiler.")


def test_fusions_are_off_where_they_do_not_compile() -> None:
    """And GELU stays what the fusion of it with a bias computes, its approximation by tanh."""
    flags, rotary, _ = run_distributed(choose_fusions, 1, True)[0]
    assert flags["bias_activation_fusion"] and rotary
    flags, rotary, of_one = run_distributed(choose_fusions, 1, False)[0]
    assert not any(flags.values()) and not rotary
    assert of_one == pytest.approx(float(torch.nn.functional.gelu(torch.ones(()), approximate="tanh")), abs=1e-7)


def open_and_cached() -> dict[str, Tensor]:
    start_parallel()
    attention, (query, key, value) = make_attention("ours", 2), make_qkv(2)
    with torch.no_grad():
        return {
            "causal": attention(query, key, value, None),
            "opened": attention(query, key, value, torch.zeros(1, 1, SEQ, SEQ, dtype=torch.bool)),
            "last 3": attention(query[-3:], key, value, None),
            "last 1": attention(query[-1:], key, value, None),
            "last 3, documents": attention(query[-3:], key, value, document_mask(BATCH, SEQ, 5)[:, :, -3:]),
            "documents": attention(query, key, value, document_mask(BATCH, SEQ, 5)),
        }


def test_no_mask_opens_the_future_and_cached_queries_see_their_past() -> None:
    got = run_distributed(open_and_cached, 1)[0]
    torch.testing.assert_close(got["opened"], got["causal"], rtol=0, atol=1e-6)
    torch.testing.assert_close(got["last 3"], got["causal"][-3:], rtol=0, atol=1e-6)
    torch.testing.assert_close(got["last 1"], got["causal"][-1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(got["last 3, documents"], got["documents"][-3:], rtol=0, atol=1e-6)
    assert not torch.allclose(got["documents"][-3:], got["causal"][-3:], atol=1e-3)


def dropped(copies: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two draws, the exact result, and what evaluation gives, for many copies of one sequence."""
    start_parallel()
    query, key, value = (tensor.repeat(1, copies, 1, 1) for tensor in make_qkv(2, batch=1))
    exact = make_attention("ours", 2)
    dropping = make_attention("ours", 2, dropout=0.3)
    with torch.no_grad():
        one, two = (dropping(query, key, value, None) for _ in range(2))
        return one, two, exact(query, key, value, None), dropping.eval()(query, key, value, None)


def test_attention_dropout() -> None:
    copies = 1000
    one, two, exact, evaluated = run_distributed(dropped, 1, copies)[0]
    assert not torch.equal(one, two) and not torch.equal(one[:, 0], one[:, 1])
    assert torch.equal(evaluated, exact)
    # The mean over independent copies, within six of its own standard errors.
    error = (one.mean(1) - exact[:, 0]).abs()
    assert (error <= 6 * one.std(1) / copies**0.5 + 1e-6).all()


def sharded_dropout() -> tuple[Tensor, Tensor]:
    """What the heads of this rank drop, with and without sequence parallelism, on equal inputs."""
    results = []
    for sequence_parallel in (False, True):
        start_parallel(2)
        config = transformer_config(Case(transformer={"attention_dropout": 0.5}), Layout(2, sequence_parallel))
        attention = make_attention("ours", HEADS, dropout=0.5)
        attention.config = config
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with torch.no_grad():
            if sequence_parallel:  # as TransformerBlock does
                with get_cuda_rng_tracker().fork():
                    results.append(attention(*make_qkv(HEADS), None))
            else:
                results.append(attention(*make_qkv(HEADS), None))
    return results[0], results[1]


def test_ranks_drop_differently_whether_or_not_under_sequence_parallelism() -> None:
    (without, with_sp), (other, other_sp) = run_distributed(sharded_dropout, 2)
    assert torch.equal(without, with_sp) and torch.equal(other, other_sp)
    assert not torch.equal(without, other)


def norm_errors() -> list[tuple[str, float]]:
    from megatron_recursive.models.norms import SequenceParallelNorm

    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    errors = []
    for kind, zero_centered in itertools.product(("RMSNorm", "LayerNorm"), (False, True)):
        options = {"normalization": kind, "layernorm_zero_centered_gamma": zero_centered}
        norm = SequenceParallelNorm(transformer_config(Case(transformer=options), Layout()), 32, eps=1e-3)
        assert (hasattr(norm, "bias"), float(norm.weight[0])) == (kind == "LayerNorm", 0.0 if zero_centered else 1.0)
        with torch.no_grad():
            norm.weight.add_(torch.randn(32, generator=torch.Generator().manual_seed(2)))
        scale = norm.weight + (1.0 if zero_centered else 0.0)
        if kind == "RMSNorm":
            expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * scale
        else:
            norm.bias.data.normal_()
            centered = x - x.mean(-1, keepdim=True)
            expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt() * scale + norm.bias
        errors.append((f"{kind}, zero-centered {zero_centered}", relative_error(norm(x).detach(), expected.detach())))
    return errors


def test_norm_follows_its_formula() -> None:
    for what, error in run_distributed(norm_errors, 1)[0]:
        assert error <= 1e-6, what


def norms_of_a_model() -> tuple[set[float], int, int]:
    from megatron_recursive.models.norms import SequenceParallelNorm

    start_parallel(2)
    case = Case(transformer={"layernorm_epsilon": 3e-4, "qk_layernorm": True})
    model = build_model(case, Layout(2, sequence_parallel=True))
    norms = [module for module in model.modules() if isinstance(module, SequenceParallelNorm)]
    marked = sum(norm.weight.sequence_parallel and norm.bias.sequence_parallel for norm in norms)
    return {norm.eps for norm in norms}, len(norms), marked


def test_every_norm_takes_the_epsilon_and_is_marked_for_sequence_parallelism() -> None:
    assert run_distributed(norms_of_a_model, 2) == [({3e-4}, 9, 9)] * 2  # 2 layers of 4, and the final one
