"""Norm placements and full-projection QK norms against formulas written out, against OLMo-2, and over layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import run_distributed
from tests.grids import chosen, grid
from tests.models import (
    HIDDEN,
    LAYERS,
    SEQ,
    VOCAB,
    Case,
    Layout,
    Training,
    build_model,
    make_batches,
    named_parameters,
    start_parallel,
    train,
    transformer_config,
)
from tests.parameters import Tensors, gathered
from tests.unit_tests.models.comparing import relative_error, worst_error

RMS = {"normalization": "RMSNorm", "add_bias_linear": False}
DISABLED = {"enable_recursive_refinement": False}
PLACEMENTS = [("pre", "branch"), *itertools.product(("post", "sandwich"), ("branch", "residual"))]
OLMO2 = Case(
    recursion=DISABLED,
    transformer={**RMS, "qk_layernorm": True, "num_query_groups": 2, "swiglu": True, "layernorm_epsilon": 1e-3},
    norms={"norm_placement": "post", "qk_norm_scope": "full"},
)

# --- the formulas ---------------------------------------------------------------------------------------------------

LAYERS_OF: dict[str, dict[str, Any]] = {
    "rmsnorm-grouped-full": {**RMS, "qk_layernorm": True, "num_query_groups": 2},
    "layernorm-bias-full": {"qk_layernorm": True, "layernorm_epsilon": 1e-2},
    "layernorm-zero-centered": {"layernorm_zero_centered_gamma": True},
    "rmsnorm-wide-heads-per-head": {**RMS, "qk_layernorm": True, "kv_channels": 16, "num_query_groups": 1},
}


def formula_cases() -> dict[str, Case]:
    return {
        f"{placement}-{scope}-{name}": Case(
            DISABLED, transformer=options,
            norms={"norm_placement": placement, "output_norm_scope": scope,
                   "qk_norm_scope": "full" if name.endswith("full") else "head"},
        )
        for (placement, scope), (name, options) in itertools.product(PLACEMENTS, LAYERS_OF.items())
    }  # fmt: skip


class Formula:
    """A GPT of a case in plain torch, over Megatron's parameters by name."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.options, self.norms, self.weights = case.transformer, case.norms, weights

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"] + float(self.options.get("layernorm_zero_centered_gamma", False))
        is_rms = self.options.get("normalization") == "RMSNorm"
        centered = x if is_rms else x - x.mean(-1, keepdim=True)
        epsilon = self.options.get("layernorm_epsilon", 1e-5)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + epsilon) ** 0.5
        return scaled * weight if is_rms else scaled * weight + self.weights[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attention(self, x_BSH: Tensor, name: str) -> Tensor:
        heads, groups = 4, self.options.get("num_query_groups", 4)
        width = self.options.get("kv_channels", HIDDEN // heads)
        batch, length = x_BSH.shape[:2]
        rows = self.linear(x_BSH, f"{name}.linear_qkv").view(batch, length, groups, heads // groups + 2, width)
        query, key, value = rows.split([heads // groups, 1, 1], 3)
        query, key = query.reshape(batch, length, -1), key.reshape(batch, length, -1)
        full = self.norms["qk_norm_scope"] == "full"
        if full:
            query, key = self.norm(query, f"{name}.q_norm"), self.norm(key, f"{name}.k_norm")
        query, key = query.view(batch, length, heads, width), key.view(batch, length, groups, width)
        if not full and self.options.get("qk_layernorm"):
            query, key = self.norm(query, f"{name}.q_layernorm"), self.norm(key, f"{name}.k_layernorm")
        query, key = rotated(query), rotated(key)
        key, value = (t.reshape(batch, length, groups, width).repeat_interleave(heads // groups, 2)
                      for t in (key, value))  # fmt: skip
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / width**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("bnqk,bknd->bqnd", weights, value).flatten(2), f"{name}.linear_proj")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.linear_fc1")), f"{name}.linear_fc2")

    def branch(self, x: Tensor, f: Any, input_norm: str, name: str, last: str, add: str) -> Tensor:
        placement, scope = self.norms["norm_placement"], self.norms["output_norm_scope"]
        out = f(x if placement == "post" else self.norm(x, input_norm), name)
        if placement == "pre":
            return x + out
        if scope == "branch":
            return x + self.norm(out, f"{name}.{last}.post_layernorm")
        return self.norm(x + out, f"{add}.post_layernorm")

    def logits(self, tokens_BS: Tensor) -> Tensor:
        embedding = self.weights["embedding.word_embeddings.weight"]
        x = embedding[tokens_BS]
        for index in range(LAYERS):
            at = f"decoder.layers.{index}"
            x = self.branch(x, self.attention, f"{at}.input_layernorm", f"{at}.self_attention", "linear_proj",
                            f"{at}.self_attn_bda")  # fmt: skip
            x = self.branch(x, self.mlp, f"{at}.pre_mlp_layernorm", f"{at}.mlp", "linear_fc2", f"{at}.mlp_bda")
        return self.norm(x, "decoder.final_layernorm") @ embedding.T


def rotated(x_BSND: Tensor) -> Tensor:
    length, half = x_BSND.shape[1], x_BSND.shape[3] // 2
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x_BSND.split(half, 3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], 3)


def formula_errors() -> dict[str, tuple[float, tuple[float, str], int]]:
    """By case: the error of the logits, the worst one of all gradients, and how many norms there are per layer."""
    errors = {}
    for name, case in formula_cases().items():
        start_parallel()
        model = build_model(case)
        batch = make_batches(case, 0)[0]
        parameters = named_parameters(model)
        copies = {key: p.detach().clone().requires_grad_() for key, p in parameters.items()}
        logits = model(batch["input_ids"], batch["position_ids"], None)
        expected = Formula(case, copies).logits(batch["input_ids"])
        for result in (logits, expected):
            F.cross_entropy(result.flatten(0, 1), batch["labels"].flatten()).backward()
        gradients = worst_error({k: p.grad for k, p in parameters.items()}, {k: p.grad for k, p in copies.items()})
        norms = sum(key.startswith("decoder.layers.0.") and key.endswith("norm.weight") for key in parameters)
        errors[name] = relative_error(logits.detach(), expected.detach()), gradients, norms
    return errors


@cache
def against_formulas() -> dict[str, tuple[float, tuple[float, str], int]]:
    return run_distributed(formula_errors, 1, timeout=120)[0]


@pytest.mark.parametrize("case", formula_cases())
def test_placement_follows_its_formula(case: str) -> None:
    logits, gradients, norms = against_formulas()[case]
    assert logits <= 1e-5
    assert gradients[0] <= 2e-5, gradients
    options = formula_cases()[case]
    per_layer = 4 if options.norms["norm_placement"] == "sandwich" else 2
    assert norms == per_layer + 2 * bool(options.transformer.get("qk_layernorm"))


# --- OLMo-2 ---------------------------------------------------------------------------------------------------------

OF_LAYER = {
    "self_attn.q_norm.weight": "self_attention.q_norm.weight",
    "self_attn.k_norm.weight": "self_attention.k_norm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "self_attention.linear_proj.post_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "post_feedforward_layernorm.weight": "mlp.linear_fc2.post_layernorm.weight",
}


def in_olmo2_names(ours: Tensors) -> Tensors:
    """Megatron's tensors (weights or gradients) of :data:`OLMO2` under transformers' names and in its shapes."""
    theirs = {"model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
              "model.norm.weight": ours["decoder.final_layernorm.weight"]}  # fmt: skip
    for index in range(LAYERS):
        at, to = f"decoder.layers.{index}.", f"model.layers.{index}."
        theirs |= {to + name: ours[at + source] for name, source in OF_LAYER.items()}
        rows = ours[f"{at}self_attention.linear_qkv.weight"].view(2, 4, HIDDEN // 4, HIDDEN)  # 2 queries, key, value
        for name, part in zip("qkv", rows.split([2, 1, 1], 1), strict=True):
            theirs[f"{to}self_attn.{name}_proj.weight"] = part.reshape(-1, HIDDEN)
        halves = ours[f"{at}mlp.linear_fc1.weight"].chunk(2)
        theirs |= {f"{to}mlp.{name}_proj.weight": half for name, half in zip(("gate", "up"), halves, strict=True)}
    return theirs


def olmo2_errors() -> tuple[float, tuple[float, str]]:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    start_parallel()
    ours = build_model(OLMO2)
    config = Olmo2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=ours.config.ffn_hidden_size, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQ, rms_norm_eps=1e-3,
        tie_word_embeddings=True, rope_theta=10000.0, attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip
    theirs = Olmo2ForCausalLM(config)
    weights = {name: p.detach() for name, p in named_parameters(ours).items()}
    missing = theirs.load_state_dict(in_olmo2_names(weights), strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
    batch = make_batches(OLMO2, 0)[0]
    results = ours(batch["input_ids"], batch["position_ids"], None), theirs(batch["input_ids"]).logits
    for logits in results:
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    mine = in_olmo2_names({name: p.grad for name, p in named_parameters(ours).items()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    return relative_error(results[0].detach(), results[1].detach()), worst_error(mine, expected)


def test_post_with_full_qk_norms_is_transformers_olmo2() -> None:
    logits, gradients = run_distributed(olmo2_errors, 1, timeout=120)[0]
    assert logits <= 1e-5
    assert gradients[0] <= 2e-5, gradients


# --- layouts --------------------------------------------------------------------------------------------------------

ADAM = {"lr": 1e-2, "clip_grad": 0.1, "weight_decay": 0.01, "adam_eps": 1e-5}  # see test_parallel.py
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
DOUBLE = {"params_dtype": torch.float64, "pipeline_dtype": torch.float64}
PARTS_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}

TRAINED: dict[str, Case] = {
    "olmo2": replace(OLMO2, recursion={}, optimizer=ADAM, steps=2),
    # Through six passes fp32 rounds up to 1.3e-5 of a gradient; in double precision a wrong sum would show.
    "olmo2-full-gradient": replace(
        OLMO2, recursion={"detach_between_refinements": False}, transformer={**OLMO2.transformer, **DOUBLE}
    ),
    "sandwich-layernorm": Case(
        transformer={"qk_layernorm": True, "layernorm_zero_centered_gamma": True},
        norms={"norm_placement": "sandwich", "qk_norm_scope": "full"}, optimizer=ADAM, steps=2,
    ),
    "sandwich-residual": Case(
        {"state_norm": "none", "state_init": "trunc-normal"}, transformer={"add_bias_linear": False},
        optimizer=ADAM, steps=2,
        norms={"norm_placement": "sandwich", "output_norm_scope": "residual"},
    ),
    "post-residual": Case(
        transformer={**RMS, "qk_layernorm": True},
        norms={"norm_placement": "post", "output_norm_scope": "residual", "qk_norm_scope": "full"},
    ),
}  # fmt: skip
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, Layout, dict[str, Any]]] = {
    "tp2": (2, Layout(tp=2), {}),
    "tp2-sp": (2, Layout(tp=2, sequence_parallel=True), {}),
    "pp2": (2, Layout(pp=2), {}),
    "dp2-distributed-optimizer": (2, Layout(ddp={**OVERLAP, "bucket_size": 2000}), {}),
    "recompute-layers": (1, Layout(), FULL_RECOMPUTE),
    "recompute-parts": (1, Layout(), PARTS_RECOMPUTE),
    "recompute-passes-tp2-sp": (2, Layout(tp=2, sequence_parallel=True, recompute_passes=True), PARTS_RECOMPUTE),
}


def train_all(names: list[str], layout: Layout, options: dict[str, Any]) -> dict[str, Training]:
    results = {}
    for name in names:
        case = TRAINED[name]
        in_double = case.transformer.get("params_dtype") == torch.float64
        how = replace(layout, ddp={**layout.ddp, "grad_reduce_in_fp32": False}) if in_double else layout
        results[name] = train(replace(case, transformer={**case.transformer, **options}), how)
    return results


# Norms meet the sharding of heads and of the sequence, and recomputation; stages and replicas hardly.
ASKED: dict[str, list[str]] = {
    "tp2": ["olmo2", "olmo2-full-gradient", "sandwich-layernorm"],
    "tp2-sp": [*TRAINED],
    "pp2": ["olmo2", "sandwich-residual"],
    "dp2-distributed-optimizer": ["sandwich-layernorm"],
    "recompute-layers": ["olmo2", "post-residual"],
    "recompute-parts": ["olmo2-full-gradient", "sandwich-layernorm", "sandwich-residual"],
    "recompute-passes-tp2-sp": ["olmo2-full-gradient", "sandwich-residual", "post-residual"],
}
PAIRS = [(layout, case) for layout, cases in ASKED.items() for case in cases]
QUICK = [("tp2-sp", "sandwich-residual"), ("recompute-parts", "sandwich-layernorm")]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> Callable[[str], list[dict[str, Training]]]:
    """By layout; "" is one process."""
    pairs = chosen(request, "layout", "case")

    @cache
    def of(layout: str) -> list[dict[str, Training]]:
        ranks, how, options = LAYOUTS[layout] if layout else (1, Layout(), {})
        names = dict.fromkeys(case for asked, case in pairs if layout in ("", asked))
        return run_distributed(train_all, ranks, [*names], how, options, timeout=180)

    return of


@pytest.mark.parametrize(("layout", "case"), grid(PAIRS, QUICK))
def test_a_layout_trains_as_one_process_does(trained: Any, layout: str, case: str) -> None:
    expected = trained("")[0][case]
    ranks = [rank[case] for rank in trained(layout)]
    tolerance = 1e-6 if case == "olmo2-full-gradient" else 1e-5
    assert set().union(*(rank.parameters for rank in ranks)) == set(expected.parameters)
    assert any(rank.metrics[0] for rank in ranks)
    for rank in ranks:
        for mine, theirs in zip(rank.metrics, expected.metrics, strict=True):
            assert not mine or mine == pytest.approx(theirs, rel=5e-6, abs=1e-6)
        for mine_of, theirs_of in zip(rank.gradients, expected.gradients, strict=True):
            assert worst_error({**theirs_of, **mine_of}, theirs_of)[0] <= tolerance
        assert rank.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
        assert worst_error({**expected.parameters, **rank.parameters}, expected.parameters)[0] <= 1e-5


def observe_disabled(case: Case, layout: Layout) -> tuple[bool, bool]:
    """Whether the model with recursion off gives the bits of Megatron's GPTModel: losses, and all gradients."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.norm_placement import NormLayout
    from tests.parameters import fill_weights

    start_parallel(layout.tp)
    ours = build_model(replace(case, recursion=DISABLED), layout)
    spec = local_block_spec(ours.config, norms=NormLayout(**case.norms))
    plain = GPTModel(ours.config, spec, VOCAB, SEQ, position_embedding_type="rope",
                     share_embeddings_and_output_weights=True)  # fmt: skip
    fill_weights(plain)
    losses = []
    for model in (ours, plain):
        losses.append(model(**make_batches(case, 0)[0]))
        losses[-1].sum().backward()
    mine, theirs = dict(ours.named_parameters()), dict(plain.named_parameters())
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name].grad, theirs[name].grad) for name in mine)
    return torch.equal(*losses), same


@pytest.mark.parametrize("case", grid(TRAINED, quick=["olmo2-full-gradient"]))
def test_disabled_recursion_is_megatrons_gpt_with_these_norms(case: str) -> None:
    layout = Layout(tp=2, sequence_parallel=True)
    assert run_distributed(observe_disabled, 2, TRAINED[case], layout) == [(True, True)] * 2


def graphs_of_a_pass_without_gradient() -> list[bool]:
    start_parallel()
    kept = []
    for placement in ("post", "sandwich"):
        case = Case(norms={"norm_placement": placement, "output_norm_scope": "residual"})
        layer = build_model(case).decoder.layers[0]
        with torch.no_grad():
            hidden_SBH, _ = layer(torch.randn(SEQ, 2, HIDDEN), None)
        kept.append(hidden_SBH.requires_grad)
    return kept


def test_a_norm_of_the_sum_keeps_no_graph_in_a_pass_without_gradient() -> None:
    """Megatron turns gradients on around the residual sum, whatever the pass says."""
    assert run_distributed(graphs_of_a_pass_without_gradient, 1)[0] == [False, False]


def messages_of_both_norms(kind: str) -> tuple[int, int]:
    """All-reduces of the norms of queries and keys, forward and backward."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_recursive.models.norms import FullProjectionNorm, norm_together

    start_parallel(2)
    config = transformer_config(Case(transformer={"normalization": kind}), Layout(tp=2))
    group, reduce, calls = parallel_state.get_tensor_model_parallel_group(), dist.all_reduce, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return reduce(*args, **kwargs)

    heads = [torch.randn(3, 2, n, HIDDEN // 4, requires_grad=True) for n in (2, 1)]
    dist.all_reduce = counted
    try:
        normed = norm_together([FullProjectionNorm(config, n, group) for n in (4, 2)], heads)
        forward = calls[0]
        sum(each.square().sum() for each in normed).backward()
    finally:
        dist.all_reduce = reduce
    return forward, calls[0] - forward


@pytest.mark.parametrize(("kind", "number"), [("RMSNorm", 1), ("LayerNorm", 2)])
def test_queries_and_keys_share_their_messages(kind: str, number: int) -> None:
    assert run_distributed(messages_of_both_norms, 2, kind) == [(number, number)] * 2


# --- checkpoints ----------------------------------------------------------------------------------------------------


def reshard(folder: Path, case: Case) -> tuple[Tensors, Tensors, Tensors, dict[str, tuple[int, ...]]]:
    """Save at TP 1, load and save at TP 2, load at TP 1: the parameters at each stop, and keys with their shapes."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    stops, shapes = [], {}
    for step, tp in enumerate((1, 2, 1)):
        start_parallel(tp)
        model = build_model(case, Layout(tp=tp))
        if step:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(7.0)
            model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder / str(step - 1))))
        (folder / str(step)).mkdir(exist_ok=True)
        torch.distributed.barrier()
        state = model.sharded_state_dict()
        shapes = {v.key: v.global_shape for v in state.values() if isinstance(v, ShardedTensor)}
        dist_checkpointing.save(state, str(folder / str(step)))
        stops.append(gathered({n: p.data for n, p in named_parameters(model).items()}, model))
    return stops[0], stops[1], stops[2], shapes


@pytest.mark.parametrize("case", grid(TRAINED, quick=["sandwich-layernorm"]))
def test_checkpoints_reshard(case: str, tmp_path: Path) -> None:
    for one, two, back, shapes in run_distributed(reshard, 2, tmp_path, TRAINED[case], timeout=120):
        assert one.keys() == two.keys() == back.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
        assert [name for name in one if not torch.equal(one[name], back[name])] == []
        if TRAINED[case].norms.get("qk_norm_scope") == "full":
            groups = TRAINED[case].transformer.get("num_query_groups", 4)
            assert shapes["decoder.layers.self_attention.q_norm.weight"] == (LAYERS, HIDDEN)
            assert shapes["decoder.layers.self_attention.k_norm.weight"] == (LAYERS, HIDDEN // 4 * groups)


# --- refusals -------------------------------------------------------------------------------------------------------


def complaints() -> list[str]:
    from megatron_recursive.models.norm_placement import NormLayout

    said = []
    for values in ({"norm_placement": "last"}, {"output_norm_scope": "residual"}):
        with pytest.raises(ValueError) as error:
            NormLayout(**values)
        said.append(str(error.value))
    start_parallel(2)
    with pytest.raises(ValueError) as error:
        build_model(replace(OLMO2, transformer={**OLMO2.transformer, "num_query_groups": 1}), Layout(tp=2))
    return [*said, str(error.value)]


def test_what_cannot_work_is_refused() -> None:
    for last, residual, groups in run_distributed(complaints, 2):
        assert last == "norm_placement must be one of pre, post, sandwich, but is last"
        assert residual == "output_norm_scope residual needs norm_placement post or sandwich"
        assert "a norm over 1 heads" in groups and "2 tensor-parallel ranks" in groups
