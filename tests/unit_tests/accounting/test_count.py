"""The command count: against built models, their caches and torch's FLOP counter, and from three sources alike."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.commands import main
from megatron_recursive.plan.depth_distributions import poisson_lognormal
from tests.distributed import run_distributed
from tests.unit_tests.hf.donors import LAYERS, make_donor, save_donor
from tests.unit_tests.hf.recursive_models import make_config, make_model
from tests.unit_tests.hf.test_published_recurrent import written

FAMILIES: dict[str, dict[str, Any]] = {
    "core": {"state_init": "trunc-normal"},
    "recurrent": {"recursion_family": "recurrent", "num_prelude_layers": 2, "num_coda_layers": 1, "num_recurrences": 3},
    "looped": {"recursion_family": "looped"},
    "hierarchical": {"recursion_family": "hierarchical"},
}
STACKS = {"core": {"core": (0, 6)}, "recurrent": {"prelude": (0, 2), "core": (2, 5), "coda": (5, 6)},
          "looped": {"core": (0, 6)}, "hierarchical": {"low": (0, 3), "high": (3, 6)}}  # fmt: skip


def count(*words: object, command: str = "count") -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([command, *map(str, words), "--json"])
    return json.loads(said.getvalue())


@pytest.mark.parametrize("kind", ["llama3, head_dim", "llama1, biases", "qwen2", "qwen3", "olmo2"])
def test_a_donor_is_counted_exactly_and_its_flops_within_a_percent(kind: str, tmp_path: Path) -> None:
    """On the CPU the counter knows the two products of decomposed attention, and counts all their scores."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = make_donor(kind)
    model.config.save_pretrained(tmp_path)  # no weights
    record = count("--model", tmp_path, "--seq-length", 32)
    assert record["parameters"]["held"]["total"] == record["parameters"]["unrolled"]["total"] == model.num_parameters()
    assert record["parameters"]["held"]["core"] == sum(p.numel() for p in model.model.layers.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False).logits.sum().backward()
    flops = record["flops_per_token"]
    assert counter.get_total_flops() / 64 == pytest.approx(flops["training"] + flops["total"]["attention"], rel=0.01)
    assert flops["inference"] == flops["total"]["forward"] and flops["grad_free_passes"]["forward"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recursive_model_is_counted_by_part(family: str, tmp_path: Path) -> None:
    shape = {"norm_weights": "ones", "attention_gate": True} if family == "hierarchical" else {}
    config = make_config(2, 1, FAMILIES[family], num_layers=6, tie_word_embeddings=False, **shape)
    model = make_model(config=config)
    model.config.save_pretrained(tmp_path)
    record, base = count("--model", tmp_path), model.model
    held, unrolled = record["parameters"]["held"], record["parameters"]["unrolled"]
    for stack, (start, stop) in STACKS[family].items():
        assert held[stack] == sum(p.numel() for p in base.layers[start:stop].parameters())
    rest = {"embedding": base.embed_tokens, "final_norm": base.norm, "output_head": model.lm_head}
    assert all(held[part] == sum(p.numel() for p in module.parameters()) for part, module in rest.items())
    assert held["total"] == sum(p.numel() for n, p in model.named_parameters() if "initial_" not in n)
    layers = record["model"]["layers_applied"]
    assert unrolled["total"] - held["total"] == (layers - 6) * sum(p.numel() for p in base.layers[0].parameters())
    cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert record["cache_bytes_per_token"] * 5 == sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)


def _three_sources(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from megatron_recursive.backends import cpu
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model
    from megatron_recursive.hf.convert.export import export_model

    cpu.install(on_purpose=True)
    knobs = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
             "backprop_depth": 2, "injection": "add", "recurrence_step": "1"}  # fmt: skip
    donor = save_donor("qwen3", folder / "donor", vocab_size=256)
    import_model(str(donor), str(folder / "ckpt"), ImportOptions(knobs, proof_dtype=None), lambda _: None)
    export_model(str(folder / "ckpt"), str(folder / "hf"), proof_dtype=None, say=lambda _: None)
    words = [word for name, value in knobs.items() for word in (f"--{name.replace('_', '-')}", value)]
    shape = f"""--num-layers {LAYERS} --hidden-size 60 --ffn-hidden-size 100 --num-attention-heads 6
        --num-query-groups 2 --kv-channels 14 --vocab-size 256 --swiglu --disable-bias-linear
        --normalization RMSNorm --qk-layernorm --untie-embeddings-and-output-weights
        --position-embedding-type rope""".split()
    layout = ["--seq-length", 32, "--tp", 2, "--pp", 2, "--gpus", 8]
    sources = [["--model", folder / "ckpt"], ["--model", folder / "hf"], ["--model", donor, *words], [*shape, *words]]
    found = [count(*source, *layout) for source in sources]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["plan", "--gpus", "8", "--tp", "2", "--pp", "2", "--model", str(folder / "ckpt"), "--seq-length", "32",
              "--json"])  # fmt: skip
    return found, json.loads(said.getvalue())


def test_sources_and_plan_agree(tmp_path: Path) -> None:
    """A checkpoint, its export, its donor with the same flags, and flags alone; memory is that of plan."""
    ((found, plan),) = run_distributed(_three_sources, 1, tmp_path, timeout=180)
    assert [each["model"]["source"] for each in found] == ["checkpoint", "Hugging Face", "Hugging Face", "flags"]
    for part in ("parameters", "flops_per_token", "cache_bytes_per_token", "memory"):
        assert [each[part] for each in found] == [found[0][part]] * len(found), part
    flops = found[0]["flops_per_token"]
    assert flops["grad_free_passes"]["forward"] > 0 == flops["grad_free_passes"]["backward"]
    (layout,), stages = plan["layouts"], found[0]["memory"]["bytes_by_stage"]
    assert max(stage["total"] for stage in stages) / 2**30 == pytest.approx(layout["total_gib"]) and len(stages) == 2
    assert found[0]["parameters"]["held"]["total"] == plan["parameters_held"]
    assert flops["training"] == pytest.approx(plan["flops_per_token"])


def test_vocabulary_rows_are_those_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_donor("qwen2").config.save_pretrained(tmp_path)
    words = "--num-layers 4 --hidden-size 60 --num-attention-heads 6 --vocab-size 251 --tp 2".split()
    assert count("--model", tmp_path)["model"]["rows"] == 251 and count(*words)["model"]["rows"] == 256
    main(["count", "--model", str(tmp_path), "--output", str(tmp_path / "out" / "count.json")])
    said = capsys.readouterr().out
    assert "parameters" in said and "grad free passes" in said and "GiB a rank, of 1 stages" in said
    record = json.loads((tmp_path / "out" / "count.json").read_text())
    assert (record["format"], record["version"]) == ("megatron-recursive count", 1)


def test_a_published_recurrent_folder_is_counted(tmp_path: Path) -> None:
    model = count("--model", written("huginn", tmp_path / "model"))["model"]
    assert (model["family"], model["passes"], model["dtype"]) == ("recurrent", 6, "bfloat16")


THREE = "--num-layers 3 --hidden-size 60 --num-attention-heads 6".split()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-layers", "4"], "--hidden-size and --num-attention-heads missing"),
        (["--model", "x", "--num-layers", "2"], "--num-layers is decided by the model of --model"),
        (["--model", "./no/such"], "./no/such does not exist"),
        ([*THREE, "--pp", "2"], "--pp 2 does not divide the 3 layers equally"),
        ([*THREE, "--tp", "4"], "--tp 4 does not divide the 6 attention heads equally"),
        ([*THREE, "--pp", "3", "--gpus", "4"], "--gpus 4 is no multiple of --tp 1 x --pp 3"),
        ([*THREE, "--pp", "3", "--global-batch-size", "2"], "--global-batch-size 2 must be a multiple of 1 (--micro"),
        (["--tp", "0"], "--tp must be positive"),
    ],
)
def test_mistakes_end_in_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["count", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1, err


def test_fewer_blocks_keep_the_windows_of_the_last_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "hidden_size": 60, "num_attention_heads": 6, "intermediate_size": 100,
             "num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 3, "L_bp_cycles": [1, 2]}  # fmt: skip
    transformers.HrmTextConfig(**shape, architectures=["HrmTextForCausalLM"]).save_pretrained(tmp_path)
    found = [count("--model", tmp_path, "--H-cycles", 1)["model"],
             count("--gpus", 1, "--model", tmp_path, "--H-cycles", 1, command="plan")]  # fmt: skip
    assert [(each["passes"], each["passes_with_gradient"]) for each in found] == [(4, 3)] * 2


@pytest.mark.parametrize("flags", ["--recurrence-distribution uniform", "--grow-depth-at 0.5:4"])
def test_plan_and_count_agree_on_steps_that_differ(flags: str) -> None:
    """Both in memory, which is that of the deepest step, and in the mean FLOPs; time goes by these."""
    model = ["--num-layers", 4, "--hidden-size", 64, "--num-attention-heads", 4, "--recursion-family", "looped",
             "--num-refinement-blocks", 3, "--seq-length", 32, *flags.split()]  # fmt: skip
    record, plan = count(*model), count("--gpus", 1, *model, command="plan")
    (layout,), (stage,) = plan["layouts"], record["memory"]["bytes_by_stage"]
    assert stage["total"] / 2**30 == pytest.approx(layout["total_gib"])
    assert plan["flops_per_token"] == pytest.approx(record["flops_per_token"]["training"], rel=2e-3)
    assert 0.35 < layout["mfu"] < 0.41 and plan["steps"]


def test_supervision_steps_are_counted_as_they_are_exported() -> None:
    model = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-latent-refinements 1".split()
    carried = count(*model, "--num-refinement-blocks", 2, "--num-supervision-steps", 3)
    exported = count(*model, "--num-refinement-blocks", 6)
    assert carried["flops_per_token"]["inference"] == exported["flops_per_token"]["inference"]
    assert carried["cache_bytes_per_token"] == exported["cache_bytes_per_token"]
    assert carried["flops_per_token"]["training"] < exported["flops_per_token"]["training"]


def test_steps_of_several_depths_are_counted_at_what_is_to_be_expected() -> None:
    model = ["--num-layers", 4, "--hidden-size", 64, "--num-attention-heads", 4, "--vocab-size", 100,
             "--seq-length", 32, "--recursion-family", "recurrent", "--injection", "add"]  # fmt: skip

    def training(*flags: object) -> float:
        return float(count(*model, *flags)["flops_per_token"]["training"])

    by_depth = [training("--num-recurrences", r, "--backprop-depth", min(r, 2)) for r in (1, 2, 3, 4, 5)]
    record = count(*model, "--num-recurrences", 2, "--backprop-depth", 2, "--grow-depth-at", "0.77:4")
    assert record["flops_per_token"]["training"] == pytest.approx(0.77 * by_depth[1] + 0.23 * by_depth[3], rel=1e-9)
    assert record["model"]["passes"] == 4 and "2, behind iteration 1540 4" in record["model"]["steps"]
    deep = count(*model, "--num-recurrences", 4, "--backprop-depth", 2)["memory"]["bytes_by_stage"]
    assert record["memory"]["bytes_by_stage"] == deep

    drawn = ["--num-recurrences", 3, "--backprop-depth", 2, "--recurrence-distribution"]
    uniform = training(*drawn, "uniform", "--max-recurrence", 5)
    assert uniform == pytest.approx(sum(by_depth) / 5, rel=2e-3)
    chances = poisson_lognormal(3.0, 5)
    mean = sum(chance * flops for chance, flops in zip(chances, by_depth, strict=True))
    assert training(*drawn, "poisson-lognormal", "--max-recurrence", 5) == pytest.approx(mean, rel=2e-3)
    growing = training(*drawn[:4], "--recurrence-curriculum", "linear", "--recurrence-curriculum-fraction", 0.75)
    assert growing == pytest.approx((by_depth[0] + by_depth[1] + 2 * by_depth[2]) / 4, rel=2e-3)
