"""Layouts that fit: their memory is that of accounting and of the printed run, their order that of their speed."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.accounting import ModelShape, Recording, StateBytes, stage_memory
from megatron_recursive.commands import main
from megatron_recursive.pipeline.balance import balanced_split, said_of_balance, split_flags
from megatron_recursive.plan import RecursionConfig, build_plan
from tests.distributed import run_distributed

SHAPE = ModelShape(8, 256, 1024, 8, 4, 32, 1024, 512, gated_linear_unit=True)
CORE = RecursionConfig(num_refinement_blocks=2, num_latent_refinements=2, detach_between_refinements=True)
PLAN = build_plan(CORE.resolved(embedding_init_std=0.02))
MODEL = ["--num-layers", "8", "--hidden-size", "256", "--num-attention-heads", "8", "--num-query-groups", "4",
         "--swiglu", "--vocab-size", "1000", "--seq-length", "512", "--num-refinement-blocks", "2"]  # fmt: skip
RECURRENT = ["--recursion-family", "recurrent", "--num-prelude-layers", "2", "--num-coda-layers", "2"]


def job_of(**settings: Any) -> Any:
    from megatron_recursive.pipeline.layouts import GIB, Job

    return replace(Job(SHAPE, PLAN, 8, GIB, 1e12, 64, Recording(1), StateBytes()), **settings)


def _searched() -> dict[str, Any]:
    from megatron_recursive.pipeline.layouts import GIB, fitting_layouts, what_would_fit

    found = fitting_layouts(job_of())
    (staged,) = [layout for layout in found if (layout.tensor, layout.pipeline) == (2, 4)]
    least = min(layout.memory.total for layout in found)
    need = {name: job_of(**settings) for name, settings in {
        "passes": {"memory": 0.8 * least}, "gpus": {"memory": 0.5 * least, "gpus": 1}, "never": {"memory": 1e6},
        "batch": {"global_batch": 3, "gpus": 5},
    }.items()}  # fmt: skip
    return {
        "order": [(layout.tensor, layout.pipeline, layout.data) for layout in found],
        "seconds": {(layout.tensor, layout.pipeline): layout.seconds for layout in found},
        "sharded": fitting_layouts(job_of(distributed_optimizer=True))[0].memory.weights,
        "replayed": fitting_layouts(job_of(recording=Recording(1, recompute_passes=True)))[0].seconds,
        "staged": (staged.micro_batches, staged.stage, staged.memory),
        "said": {name: what_would_fit(job) for name, job in need.items()}, "gib": GIB,
    }  # fmt: skip


@pytest.fixture(scope="module")
def searched() -> dict[str, Any]:
    (found,) = run_distributed(_searched, 1)
    return found


def test_all_layouts_are_there_the_fastest_first(searched: dict[str, Any]) -> None:
    """TP divides the 4 groups, PP the 8 layers. Data parallelism alone neither waits nor is charged for TP."""
    sizes = {(t, p, 8 // t // p) for t in (1, 2, 4) for p in (1, 2, 4, 8) if t * p <= 8}
    assert {*searched["order"]} == sizes and searched["order"][0] == (1, 1, 8)
    seconds = searched["seconds"]
    assert list(seconds.values()) == sorted(seconds.values())
    assert seconds[2, 1] == pytest.approx(1.05 * seconds[1, 1]) and seconds[4, 1] == pytest.approx(1.1 * seconds[1, 1])
    # Comparable over PP: the same work on the same GPUs, and waits besides.
    assert seconds[1, 1] < seconds[1, 2] < seconds[1, 4] < seconds[1, 8] < 1.5 * seconds[1, 1]
    # 64 samples on 8 GPUs, 9 forwards of layers and of 2 projections, 3 backwards of layers and one of a projection.
    assert searched["replayed"] / seconds[1, 1] == pytest.approx(1 + 3 / (6 + 6) / 1.08, rel=0.05)


def test_memory_is_that_of_accounting(searched: dict[str, Any]) -> None:
    batches, stage, memory = searched["staged"]
    assert (batches, stage) == (64, 0)
    stages = stage_memory(
        SHAPE, PLAN, Recording(1, tensor_parallel=2, sequence_parallel=True), StateBytes(), layers_per_stage=(2,) * 4,
        in_flight=8, window=16,  # of 64: two and four a stage
        most_held=lambda stage, kept: (15, 13, 11, 9)[stage] * max(kept),
    )  # fmt: skip
    assert memory == stages[0] and max(stages, key=lambda each: each.total) == stages[0]
    (one,) = stage_memory(SHAPE, PLAN, Recording(1), StateBytes(optimizer_shards=8))
    assert searched["sharded"] == one.weights


def test_what_does_not_fit_is_told_what_would(searched: dict[str, Any]) -> None:
    said = searched["said"]
    assert all(text.endswith(".") and "\n" not in text for text in said.values())
    assert said["passes"].startswith("No layout fits: the leanest (TP 2, PP 4")
    assert said["passes"].endswith("; it fits with --recompute-passes.")
    assert "--gpus" in said["gpus"] and "larger GPUs" in said["never"] and "--global-batch-size" in said["batch"]


# --- the command ----------------------------------------------------------------------------------------------------


def _printed(folder: str) -> dict[str, Any]:
    from argparse import Namespace

    from megatron_recursive.hf.convert.torch_dist import TorchDistWriter
    from tests.examples import Command, facts_of

    def plan(*words: str) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            main(["plan", *words, "--json"])
        return json.loads(said.getvalue())

    text = io.StringIO()
    picture = str(Path(folder) / "new" / "a.png")
    job = ["--gpus", "8", "--bf16", "--use-distributed-optimizer", "--recompute-passes"]
    found = plan(*job, *MODEL, "--tp", "2", "--pp", "2", "--tokens", "1B", "--timeline", picture)
    with contextlib.redirect_stdout(text):
        main(["plan", *job, *MODEL, "--tokens", "1B"])
    recurrent = plan(*job, *MODEL[:-2], *RECURRENT, "--tp", "1", "--pp", "4")
    carried = plan(*job, *MODEL, "--tp", "2", "--pp", "2", "--tokens", "1B", "--num-supervision-steps", "3")

    def line(report: dict[str, Any]) -> Command:
        words = shlex.split(report["command"])
        flags = [w for w in words[words.index("pretrain") + 1 :]
                 if not w.startswith(("--nproc", "--data-path", "--tok"))]  # fmt: skip
        return Command([], [*flags, "--mock-data", "--tokenizer-type=NullTokenizer", f"--save={folder}/save"], 8)

    facts = facts_of({"line": line(found), "recurrent": line(recurrent), "carried": line(carried)})

    writer = TorchDistWriter(Path(folder) / "ckpt" / "release")
    stored = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "seq_length": 32,
              "padded_vocab_size": 256, "max_position_embeddings": 64, "num_refinement_blocks": 2,
              "global_batch_size": 16, "bf16": True}  # fmt: skip
    writer.add_common({"args": Namespace(**stored)})
    writer.close()
    llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 128, "vocab_size": 200, "num_key_value_heads": 2, "hidden_act": "silu"}  # fmt: skip
    (Path(folder) / "config.json").write_text(json.dumps(llama))
    return {"found": found, "facts": facts["line"], "recurrent": (recurrent, facts["recurrent"]),
            "carried": (carried, facts["carried"]),
            "text": text.getvalue(), "picture": Path(picture).read_bytes()[:4],
            "ckpt": plan("--gpus", "4", "--model", f"{folder}/ckpt/release"),
            "hf": plan("--gpus", "4", "--model", folder)}  # fmt: skip


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run_distributed(_printed, 1, str(tmp_path_factory.mktemp("plan")), timeout=120)
    return found


def test_the_printed_line_is_a_run_of_the_memory_and_flops_that_were_told(printed: dict[str, Any]) -> None:
    found, facts = printed["found"], printed["facts"]
    assert isinstance(facts, dict), facts
    (layout,) = found["layouts"]
    assert (facts["tensor"], facts["pipeline"], facts["data"]) == (2, 2, 2)
    assert facts["weights"] / 2**30 == pytest.approx(layout["weights_gib"])
    told = layout["passes_gib"] + layout["head_gib"]
    assert facts["activations"] / 2**30 == pytest.approx(told) and layout["total_gib"] > told
    assert (facts["passes"], facts["with gradient"]) == (found["passes"], found["passes_with_gradient"]) == (14, 14)
    assert facts["held"] == found["parameters_held"]  # padded for --tp 2
    days = layout["days"] * 86400 * layout["tokens_per_second"]
    assert days == pytest.approx(1e9) and facts["train"] == -(-(10**9) // (32 * 512))


def test_tokens_are_of_the_data_where_steps_share_a_batch(printed: dict[str, Any]) -> None:
    (carried, facts), (once,) = printed["carried"], printed["found"]["layouts"]
    assert isinstance(facts, dict) and facts["train"] == 3 * printed["facts"]["train"], facts
    assert "--save-interval=1002 " in carried["command"]  # a run refuses to stop within a batch
    (layout,) = carried["layouts"]
    assert (layout["mfu"], layout["step_seconds"]) == (once["mfu"], once["step_seconds"])
    assert layout["days"] == pytest.approx(3 * once["days"])
    assert layout["days"] * 86400 * layout["tokens_per_second"] == pytest.approx(1e9)


def test_a_core_is_spread_over_the_stages(printed: dict[str, Any]) -> None:
    """Equal stages would leave the first and the last one with a prelude and a coda, which run once."""
    found, facts = printed["recurrent"]
    (layout,) = found["layouts"]
    assert layout["layers_per_stage"] == [3, 1, 1, 3]
    assert "--decoder-first-pipeline-num-layers=3 --decoder-last-pipeline-num-layers=3" in found["command"]
    assert isinstance(facts, dict), facts
    assert facts["activations"] / 2**30 == pytest.approx(layout["passes_gib"] + layout["head_gib"])


def test_flags_that_balance_the_stages_are_told() -> None:
    plan = build_plan(RecursionConfig(
        recursion_family="recurrent", num_prelude_layers=2, num_coda_layers=2, num_recurrences=4
    ).resolved(embedding_init_std=0.02))  # fmt: skip
    shape = replace(SHAPE, hidden_size=4096, ffn_hidden_size=16384)
    assert [balanced_split(plan, shape, stages) for stages in (1, 2, 4)] == [(8,), (4, 4), (3, 1, 1, 3)]
    assert balanced_split(PLAN, shape, 4) == (2, 2, 2, 2)  # one stack
    assert said_of_balance(plan, shape, (3, 1, 1, 3)) == said_of_balance(plan, shape, (4, 4)) == ""
    said = said_of_balance(plan, shape, (2, 2, 2, 2))
    assert said.startswith("stages of 2, 2, 2, 2 layers: with --decoder-first-pipeline-num-layers=3 --decoder-last-pip")
    assert said.endswith("the fullest works 25% less")
    assert "with equal stages the fullest works" in said_of_balance(plan, shape, (2, 6))
    assert split_flags((3, 5)) == ["--decoder-first-pipeline-num-layers=3"]


def test_the_table_and_the_timeline(printed: dict[str, Any]) -> None:
    text = printed["text"]
    table = text.split("\n\n")[1].split("\n")
    assert table[0].split()[:4] == ["TP", "PP", "DP", "batches"] and table[1].split()[:3] == ["1", "1", "8"]
    assert max(map(len, text.split("\n")[:-2])) <= 100 and "pretrain --nproc-per-node=8" in text.split("\n")[-2]
    assert printed["picture"] == b"\x89PNG" and printed["found"]["timeline"]["stages"] == 2


def test_a_checkpoint_and_a_hugging_face_folder_describe_the_model(printed: dict[str, Any]) -> None:
    ckpt, hf = printed["ckpt"], printed["hf"]
    assert (ckpt["layers"], ckpt["passes"], ckpt["layouts"][0]["micro_batches"]) == (4, 14, 4)
    assert "--load=" in ckpt["command"] and "--bf16" in ckpt["command"]
    assert (hf["layers"], hf["width"], hf["passes"]) == (4, 64, 6) and "--load=CKPT" in hf["command"]
    assert "--recursion-family=recurrent" in hf["command"] and "--recurrence-step=mean" in hf["command"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-layers", "4"], "--hidden-size and --num-attention-heads missing"),
        (["--model", "x", "--num-layers", "2"], "--num-layers is decided by the model of --model"),
        ([*MODEL, "--mfu", "40"], "--mfu must be positive and at most 1, but is 40.0"),
        ([*MODEL, "--gpu-memory", "nan"], "--gpu-memory must be positive"),
        ([*MODEL, "--gpus-per-node", "5"], "--gpus 8 fill no nodes of --gpus-per-node 5"),
        ([*MODEL, "--tokens", "lots"], "--tokens lots must be a positive number such as 300M"),
        ([*MODEL[:4], "--num-attention-heads", "3"], "--num-attention-heads must divide --hidden-size"),
    ],
)
def test_mistakes_end_in_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--gpus", "8", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1
