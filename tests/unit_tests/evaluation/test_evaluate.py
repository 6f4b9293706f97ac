"""lm-eval with our model: the scores of its own Hugging Face model, exits counted, depths, checkpoints, processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from tests.distributed import REPOSITORY, run_distributed
from tests.unit_tests.inference import folders

pytestmark = pytest.mark.heavy
pytest.importorskip("lm_eval", reason="run make install-eval")

TASKS = REPOSITORY / "examples" / "evaluation"
KINDS = ("cpython_cloze", "cpython_choice", "cpython_count")
EARLY = {"exit": "halting", "halt_threshold": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "POSITIONS", 320)
        yield folders.write_recursive(tmp_path_factory.mktemp("models") / "model")


def scores(lm: Any, tasks: tuple[str, ...] = KINDS, **more: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Metrics, every answer of the model, and what the model tells of itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        lm, tasks=list(tasks), limit=5, gen_kwargs={"max_gen_toks": 6}, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), **more,
    )  # fmt: skip
    if found is None:
        return {}, None, {}
    answers = {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}
    return found["results"], answers, found["config"].get("recursion", {})


def recursive(pretrained: Path | str, **arguments: Any) -> Any:
    from megatron_recursive.evaluation.recursive_lm import RecursiveLM

    return RecursiveLM(str(pretrained), device="cpu", dtype="float32", **{"batch_size": 3, **arguments})


@pytest.mark.parametrize("blocks", [None, 2])
def test_scores_are_those_of_the_harness_s_own_model(folder: Path, blocks: int | None) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = scores(recursive(folder, num_refinement_blocks=blocks))
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)
    if blocks is not None:
        theirs.model.set_num_refinement_blocks(blocks)
    expected = scores(theirs)
    assert ours[:2] == expected[:2] and [len(found) for found in ours[1].values()] == [5, 5, 10]
    assert ours[2] == {"num_refinement_blocks": blocks or 3, "mean_blocks": blocks or 3, "flops_saved": 0}
    assert scores(recursive(folder, num_refinement_blocks=1))[1] != expected[1], "depth changes the answers"


def test_the_asked_depth_counts_and_not_that_of_the_folders_settings(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "served")
    (tmp_path / "served" / "generation_config.json").write_text('{"num_refinement_blocks": 3}')
    found, expected = (scores(recursive(place, num_refinement_blocks=2), KINDS[2:])[1]
                       for place in (tmp_path / "served", folder))  # fmt: skip
    assert found == expected != scores(recursive(folder, num_refinement_blocks=3), KINDS[2:])[1]


def test_under_an_exit_blocks_and_flops_are_counted_without_padding(folder: Path) -> None:
    single, batched = (recursive(folder, batch_size=size, **EARLY) for size in (1, 4))
    texts = scores(single, ("cpython_cloze",)), scores(batched, ("cpython_cloze",))
    assert texts[0][2] == texts[1][2] and single.spent == batched.spent
    assert 1.1 < texts[0][2]["mean_blocks"] < 2.9 and 0.03 < texts[0][2]["flops_saved"] < 0.7
    assert texts[0][2]["tokens"] == sum(texts[0][2][f"tokens of {blocks} blocks"] for blocks in (1, 2, 3))

    lm = recursive(folder, **EARLY)
    assert (lm.loglikelihood([]), lm.spent) == ([], {})
    asked = lm.get_model_info()["recursion"]
    assert asked["exit"] == "halting" and asked["mean_blocks"] is asked["flops_saved"] is None, "all were cached"
    _, answers, told = scores(lm, ("cpython_count",))
    report = lm.model.last_exit_report
    assert report.decoded_tokens and lm.spent["tokens"] > report.tokens, "two batches"
    assert told["mean_blocks"] == lm.spent["blocks"] / lm.spent["tokens"] and told["halt_threshold"] == 0.6
    assert answers != scores(recursive(folder), ("cpython_count",))[1]

    none = recursive(folder, exit="halting", halt_threshold=1 - 1e-12, num_refinement_blocks=4)
    deep = recursive(folder, num_refinement_blocks=4)
    found, expected = scores(none), scores(deep)
    assert found[0] == expected[0] and found[2]["mean_blocks"] == 4 and -0.02 < found[2]["flops_saved"] < 0


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, bare, empty = folders.write_plain(tmp_path / "plain"), tmp_path / "bare", tmp_path / "empty"
    bare.mkdir()
    empty.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    for pretrained, arguments, sentence in (
        (folder, {"halt_treshold": 0.5}, "no model argument halt_treshold; the nearest is halt_threshold"),
        (folder, {"num_refinement_block": 2}, "the nearest is num_refinement_blocks"),
        (folder, {"num_refinement_blocks": 0}, "blocks must be at least 1, but is 0"),
        (folder, {"exit": "soon"}, "exit must be one of halting,"),
        (folder, {"exit": "halting", "halt_threshold": 2.0}, "halt_threshold must lie strictly between 0 and 1"),
        (folder, {"halt_threshold": 0.5}, "halt_threshold belongs to an exit"),
        (plain, {"num_refinement_blocks": 2}, "needs a recursive model"),
        (plain, EARLY, "exit needs a recursive model"),
        (tmp_path / "nowhere", {}, "nowhere does not exist"),
        (bare, {}, "holds no tokenizer; give its folder with --model_args tokenizer=DIR"),
        (empty, {}, "empty"),
    ):
        with pytest.raises(UserError, match=sentence):
            recursive(pretrained, **arguments)
    assert "recursion" not in recursive(plain).get_model_info()
    for words, sentence in (
        ("--taks a", "Unrecognized arguments: --taks a"),
        ("--model hf --model_args pretrained=x --tasks a --depths 1", "--depths sets the depth of --model recursive"),
        ("ls tasks --depths 1", "--depths runs tasks"),
        ("--log_samples --tasks a", "Specify --output_path"),
        ("--depths 0,1", "'0,1' is no list of numbers"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *words.split()])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and sentence in error


def test_one_table_over_depths(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))  # thousands of them
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", "recursive", "--model_args", f"pretrained={folder}", "--tasks", "nope"])
    assert "error: Tasks not found: nope" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(folder), "--include_path", str(TASKS), "--tasks", "cpython_count",
              "--limit", "1", "--gen_kwargs", "max_gen_toks=320"])  # fmt: skip
    error = capsys.readouterr().err.splitlines()
    assert any("(320)" in line and line.endswith("ask for fewer with --gen_kwargs max_gen_toks=N.") for line in error)
    words = ["--model", str(folder), "--model_args", "dtype=float32", "--limit", "5",
             "--batch_size", "3", "--include_path", str(TASKS), "--tasks", "cpython_cloze,cpython_choice"]  # fmt: skip
    main(["evaluate", *words, "--depths", "1,2", "--output", str(tmp_path / "out"),
          "--use_cache", str(tmp_path / "cache")])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()[-8:]
    records = json.loads(Path(lines[-1]).read_text())
    assert [each["depth"] for each in records] == [1, 2] and lines[0].split() == "task metric depth 1 depth 2".split()
    for column, record in enumerate(records, 2):
        written = json.loads(Path(record["file"]).read_text())
        assert written["results"] == record["results"] and written["config"]["recursion"] == record["recursion"]
        direct = scores(recursive(folder, num_refinement_blocks=record["depth"]), KINDS[:2])[0]
        for line in lines[1:-3]:
            task, metric, *_ = cells = line.split()
            assert record["results"][task][f"{metric},none"] == direct[task][f"{metric},none"]
            assert float(cells[column]) == pytest.approx(direct[task][f"{metric},none"], rel=1e-3, abs=5e-5)
    assert lines[-3].split() == "blocks a token 1.00 2.00".split() and "0.0%" in lines[-2]


def test_answers_fit_a_model_of_128_positions() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    count, steps = (load_yaml(TASKS / f"{name}.yaml")["generation_kwargs"] for name in ("count", "steps"))
    assert count["max_gen_toks"] < 100 and count == {**steps, "max_gen_toks": count["max_gen_toks"]}


def test_the_prompt_of_gsm8k_has_eight_shots_in_steps() -> None:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    asked = {"question": "How many?", "answer": "3 and 4 are 7.\n#### 7"}
    config = load_yaml(TASKS / "gsm8k.yaml")
    del config["dataset_path"], config["dataset_name"]
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: {"test": Dataset.from_list([asked])}})
    task.set_fewshot_seed(1)
    prompt = task.fewshot_context(asked, num_fewshot=8)
    assert prompt.count("A: Let's think step by step.") == 9 and prompt.count("The answer is ") == 8
    assert prompt.endswith("Q: How many?\nA: Let's think step by step.") and task.doc_to_target(asked) == "7"
    for said, right in (("3 + 4 = 7. The answer is 7.", 1), ("So it is 7.", 0), ("The answer is 8.", 0)):
        task.build_all_requests(limit=1)
        task.instances[0].resps = [said]
        task.apply_filters()
        assert task.process_results(asked, [task.instances[0].filtered_resps["strict-match"]]) == {"exact_match": right}


def _check_checkpoint(folder: str, place: str) -> None:
    """In a worker, which has Megatron imported: scores of a checkpoint are those of the folder that it came from."""
    from megatron_recursive.evaluation import recursive_lm
    from megatron_recursive.hf.convert import donor_import

    donor_import.import_model(folder, f"{place}/ckpt", donor_import.ImportOptions({}))
    lm = recursive(f"{place}/ckpt", num_refinement_blocks=2)
    assert lm.pretrained == f"{place}/ckpt" and scores(lm) == scores(recursive(folder, num_refinement_blocks=2))
    export = recursive_lm.exported(f"{place}/ckpt", None)
    assert recursive_lm.exported.cache_info().misses == 1 and Path(export, "config.json").is_file()


def test_a_checkpoint_is_exported_first(folder: Path, tmp_path: Path) -> None:
    run_distributed(_check_checkpoint, 1, str(folder), str(tmp_path), timeout=300)


def _split_over_processes(folder: str) -> tuple[Any, Any]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier job on this worker
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        found = scores(recursive(folder, **EARLY))
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
        AcceleratorState._reset_state(reset_partial_state=True)
    return found[0], found[2]


def test_two_processes_share_the_work(folder: Path) -> None:
    (found, told), other = run_distributed(_split_over_processes, 2, str(folder), timeout=300)
    expected, _, alone = scores(recursive(folder, **EARLY))
    assert other == ({}, {})
    for task, values in expected.items():
        assert {name: pytest.approx(value, rel=1e-6) for name, value in values.items() if "," in name and
                isinstance(value, float)}.items() <= found[task].items(), task
    assert told["tokens"] > alone["tokens"] * 0.99 and told["mean_blocks"] == pytest.approx(alone["mean_blocks"], 0.05)


def test_what_cached_answers_cost_is_not_known() -> None:
    from megatron_recursive.evaluation.command import table

    unknown = {"depth": 4, "results": {}, "recursion": {"mean_blocks": None, "flops_saved": None}}
    assert [line.split()[-1] for line in table([unknown])[-2:]] == ["-", "-"]
