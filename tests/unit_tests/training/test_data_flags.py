"""Megatron's data flags under a recursive model: which sources, in which shares, under which masks; nothing leaks.

Flags are parsed as by the entry script, and Megatron builds its datasets and loaders from them, many cases in one job.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.grids import grid
from tests.quick_start import start_quickly
from tests.unit_tests.training.runs import FLAGS, RECURSION, SCRIPT, losses_of, records_of, refusals, save_to, train

EOD, SEQ = 126, 16  # the NullTokenizer's last id of 127
DOCUMENT = 8  # tokens, the EOD included: two documents fill a sample
SOURCES = {"a": 0, "b": 1, "c": 2}
ON_DATA = [flag for flag in FLAGS if flag != "--mock-data"]
HUNDRED = ["--train-iters", "100", "--lr-decay-iters", "100"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run_distributed(write_sources, 1, str(folder))
    return folder


def write_sources(folder: str) -> None:
    """A dataset for each source. Documents of source k hold the ids 40 k to 40 k + 39, and say where they stand.

    The first id of a document is 40 k + 4 (tenth of the dataset it stands in).
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    for name, number in SOURCES.items():
        prefix = f"{folder}/{name}"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(127))
        for index in range(200):
            start = 40 * number + 4 * (index // 20)
            ids = [start + place % 4 for place in range(DOCUMENT - 1)]
            builder.add_document(torch.tensor([*ids, EOD]), [DOCUMENT])
        builder.finalize(f"{prefix}.idx")


# --- in the workers -------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Any:
    """Arguments as the entry script parses them; Megatron's global state of an earlier case is dropped first."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from megatron_recursive.training.arguments import parse_arguments
    from megatron_recursive.training.patches import wheel

    destroy_global_vars()
    destroy_num_microbatches_calculator()
    sys.argv = [str(SCRIPT), *argv]
    start_quickly()
    wheel.install()
    args, _ = parse_arguments()
    args.iteration = 0
    return args


def read(loader: Iterator[dict[str, Tensor]] | None, samples: int) -> list[dict[str, Tensor]]:
    from megatron_recursive.training.forward_step import get_batch

    return [get_batch(loader) for _ in range(samples // 2)] if loader is not None else []


def splits_of(cases: dict[str, list[str]]) -> dict[str, list[list[dict[str, Tensor]]]]:
    """Every sample that a run would train on, and the first ones that it would evaluate and test on."""
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_recursive.training.forward_step import datasets_provider
    from tests.models import start_parallel

    start_parallel()
    found = {}
    for name, argv in cases.items():
        args = parse(argv)
        loaders = build_train_valid_test_data_iterators(datasets_provider)
        counts = (4 * args.train_iters, *[8 if args.eval_iters else 0] * 2)
        found[name] = [read(loader, count) for loader, count in zip(loaders, counts, strict=True)]
    return found


def source_counts(batches: list[dict[str, Tensor]]) -> dict[str, int]:
    """How many samples come from each source; none may mix them."""
    counts: Counter[str] = Counter()
    for batch in batches:
        for tokens in batch["tokens"]:
            numbers = {int(token) // 40 for token in tokens if token != EOD}
            assert len(numbers) == 1, tokens
            counts[list(SOURCES)[numbers.pop()]] += 1
    return dict(counts)


def tenths(batches: list[dict[str, Tensor]]) -> set[int]:
    """Which tenths of the datasets the documents come from."""
    return {int(t) % 40 // 4 for batch in batches for t in batch["tokens"].flatten() if t != EOD}


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blends(data: Path) -> dict[str, Any]:
    prefix = {name: str(data / name) for name in SOURCES}
    listed, per_split = data / "blend.txt", data / "splits.json"
    listed.write_text(f"3 {prefix['a']}\n1 {prefix['b']}\n")
    per_split.write_text(json.dumps({"train": [prefix["a"]], "valid": prefix["b"], "test": ["1", prefix["c"]]}))
    sequences = data / "sequences.json"
    sequences.write_text(json.dumps(dict.fromkeys(prefix.values(), [200, 201])))
    evaluated = ["--eval-iters", "2", "--eval-interval", "100"]
    common = [*ON_DATA, *RECURSION, *HUNDRED, *evaluated]
    cases = {
        "one": ["--data-path", prefix["b"]],
        "weights": ["--data-path", "30", prefix["a"], "10", prefix["b"], "60", prefix["c"]],
        "no weights": ["--data-path", prefix["a"], prefix["b"], "--train-iters", "40"],
        "args path": ["--data-args-path", str(listed)],
        "per split": ["--train-data-path", "1", prefix["a"], "1", prefix["b"], "--valid-data-path", prefix["b"],
                      "--test-data-path", prefix["c"], "--split"],
        "per split file": ["--per-split-data-args-path", str(per_split), "--split"],
        "split": ["--data-path", prefix["a"], "--split", "70,20,10"],
        "no test": ["--data-path", prefix["a"], "--split", "90,10,0"],
        "fast": ["--train-data-path", "3", prefix["a"], "1", prefix["b"], "--valid-data-path", prefix["b"],
                 "--test-data-path", prefix["c"], "--per-dataset-sequences-path", str(sequences),
                 "--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap", "--data-cache-path",
                 str(data / "cache"), "--split"],
    }  # fmt: skip
    filled = {}
    for name, flags in cases.items():
        argv = [*common, *flags]
        if flags[-1] == "--split":  # these excludes it
            at = argv.index("--split")
            argv = [*argv[:at], *argv[at + 2 : -1]]
        filled[name] = argv
    fast = filled.pop("fast")
    found = run_distributed(splits_of, 1, filled, timeout=120)[0]
    # The fast path reads caches that must exist: the first run writes them.
    slow = [flag for flag in fast if not flag.startswith("--dataloader-")]
    found |= run_distributed(splits_of, 1, {"slow": slow, "fast": fast}, timeout=120)[0]
    return found


@pytest.mark.grid
def test_blends_give_each_source_its_share(blends: dict[str, Any]) -> None:
    shares = {
        "one": {"b": 1.0},
        "weights": {"a": 0.3, "b": 0.1, "c": 0.6},
        "no weights": {"a": 0.5, "b": 0.5},  # by size
        "args path": {"a": 0.75, "b": 0.25},
        "fast": {"a": 0.75, "b": 0.25},
        "per split": {"a": 0.5, "b": 0.5},
    }
    for name, expected in shares.items():
        counts = source_counts(blends[name][0])
        assert set(counts) == set(expected), (name, counts)
        for source, share in expected.items():
            assert abs(counts[source] - share * sum(counts.values())) <= 2, (name, counts)


def test_each_split_has_its_own_sources(blends: dict[str, Any]) -> None:
    for name in ("per split", "per split file"):
        _, valid, test = blends[name]
        assert (set(source_counts(valid)), set(source_counts(test))) == ({"b"}, {"c"}), name
    assert set(source_counts(blends["per split file"][0])) == {"a"}


def test_split_cuts_the_documents_in_order(blends: dict[str, Any]) -> None:
    train_set, valid, test = map(tenths, blends["split"])
    assert train_set == set(range(7)) and valid <= {7, 8} and test <= {9} and valid and test
    assert not blends["no test"][2]


def test_the_fast_path_gives_the_same_samples(blends: dict[str, Any]) -> None:
    pairs = list(zip(blends["slow"][0], blends["fast"][0], strict=True))
    assert pairs and all(torch.equal(slow["tokens"], fast["tokens"]) for slow, fast in pairs)


def evaluations_of(cases: dict[str, tuple[list[str], int]]) -> dict[str, list[list[Any]]]:
    """The samples of three evaluations in a row of each case, which begin behind so many that are consumed."""
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_recursive.training.forward_step import datasets_provider
    from tests.models import start_parallel

    start_parallel()
    found = {}
    for name, (argv, consumed) in cases.items():
        args = parse(argv)
        args.consumed_valid_samples = consumed
        _, loader, _ = build_train_valid_test_data_iterators(datasets_provider)
        found[name] = [[row.tolist() for batch in read(loader, 40) for row in batch["tokens"]] for _ in range(3)]
    return found


def test_every_evaluation_of_text_reads_the_same_samples(data: Path) -> None:
    """Of runs of any length, resumed ones too; Megatron's own goes on, and shuffles by how many it asks for."""
    evaluated = ["--eval-iters", "10", "--eval-interval", "2", "--data-cache-path", str(data / "cache")]
    common = [*ON_DATA, *RECURSION, *evaluated, "--split", "20,80,0"]  # 40 of 79 samples
    short, long = ([*common, "--data-path", str(data / "a"), *each] for each in (["--train-iters", "4"], HUNDRED))
    cases = {
        "short": (short, 0),
        "long": (long, 0),
        "resumed": (long, 400),
        "of other --eval-iters before": (long, 404),
        "cyclic": ([*long, "--dataloader-type", "cyclic"], 404),
        "few": ([*common, "--split", "90,10,0", "--data-path", str(data / "a"), str(data / "b")], 40),
    }
    found = run_distributed(evaluations_of, 1, cases, timeout=120)[0]
    few = found.pop("few")  # a blend without weights ends after its 18 samples
    assert few[0] == few[1] == few[2] and len({str(sample) for sample in few[0]}) == 2
    expected = found["short"][0]
    assert len({str(sample) for sample in expected}) > 8
    for name, evaluations in found.items():
        for each in evaluations:
            assert (sorted(each) == sorted(expected)) if name == "cyclic" else (each == expected), name


# --- positions and masks --------------------------------------------------------------------------------------------

RESETS = {
    "none": [],
    "positions": ["--reset-position-ids"],
    "mask": ["--reset-attention-mask"],
    "loss": ["--eod-mask-loss"],
    "all": ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"],
}


def test_positions_and_masks_are_as_the_flags_say(data: Path) -> None:
    common = [*ON_DATA, *RECURSION, *HUNDRED, "--data-path", str(data / "a")]
    cases = {name: [*common, *flags] for name, flags in RESETS.items()}
    cases["mock"] = [*FLAGS, *RECURSION, *HUNDRED, *RESETS["all"]]
    found = run_distributed(splits_of, 1, cases, timeout=120)[0]
    ends = 0
    for name, (batches, *_) in found.items():
        flags = RESETS["all"] if name == "mock" else RESETS[name]
        for batch in batches[:20]:
            for row in range(2):
                check_sample({key: value[row] for key, value in batch.items() if value is not None}, flags)
                ends += int((batch["tokens"][row] == EOD).sum())
    assert ends > 100


def check_sample(sample: dict[str, Tensor], flags: list[str]) -> None:
    """Positions, loss mask and document ids of one sample, derived again from where its documents end."""
    is_end = sample["tokens"] == EOD
    document = torch.cat([torch.zeros(1, dtype=torch.long), is_end.long().cumsum(0)[:-1]])
    place = torch.arange(SEQ)
    if "--reset-position-ids" in flags:
        first = torch.tensor([int(place[document == number].min()) for number in document])
        assert torch.equal(sample["position_ids"], place - first)
    else:
        assert torch.equal(sample["position_ids"], place)
    counted = ~is_end if "--eod-mask-loss" in flags else torch.ones(SEQ, dtype=torch.bool)
    assert torch.equal(sample["loss_mask"].bool(), counted)
    if "--reset-attention-mask" in flags:
        assert torch.equal(sample["document_ids"], document)
    else:
        assert "document_ids" not in sample
    assert "attention_mask" not in sample  # causal, by the attention itself


# --- leaks ----------------------------------------------------------------------------------------------------------


def second_documents(argv: list[str], layout: tuple[int, int], change: bool, told: bool) -> dict[str, list[Tensor]]:
    """What this stage computes on second documents: hidden states of every pass, and on the last stage what heads say.

    Args:
        layout: tensor- and pipeline-parallel sizes.
        change: whether to give every first document other tokens (its end stays).
        told: the loader says where documents lie, and no token does.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_recursive.pipeline import dispatch
    from megatron_recursive.training.forward_step import datasets_provider, forward_step
    from megatron_recursive.training.model_provider import RecursiveGPTModelBuilder, model_config_from_args
    from tests.models import start_parallel
    from tests.parameters import fill_weights

    tp, pp = layout
    start_parallel(tp, pp)
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    args = parse([*argv, *sizes])
    config = model_config_from_args(args, recursion_of(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = RecursiveGPTModelBuilder(config).build_model(groups).eval()
    fill_weights(model)
    seen: dict[str, list[Tensor]] = {"passes": [], "logits": [], "halting": []}
    decode, logits = model.decode, model.project

    def record_pass(*given: Any, **how: Any) -> Tensor:
        seen["passes"].append(decode(*given, **how))
        return seen["passes"][-1]

    def record_logits(*given: Any) -> Tensor:
        seen["logits"].append(logits(*given).clone())  # the cross-entropy overwrites them
        return seen["logits"][-1]

    model.decode, model.project = record_pass, record_logits
    if model.post_process:
        model.halting_head.register_forward_hook(lambda *said: seen["halting"].append(said[-1].transpose(0, 1)))
    train_loader, *_ = build_train_valid_test_data_iterators(datasets_provider)
    dispatch.install()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=changed(train_loader, change, told),
            model=[model], num_microbatches=4, seq_length=SEQ, micro_batch_size=2, forward_only=True,
        )  # fmt: skip
    return {name: [tensor[DOCUMENT:].clone() for tensor in tensors] for name, tensors in seen.items()}


def recursion_of(args: Any) -> Any:
    from megatron_recursive.plan import RecursionConfig

    return RecursionConfig.from_mapping(vars(args))


def changed(loader: Iterator[dict[str, Tensor]] | None, change: bool, told: bool) -> Iterator[dict[str, Tensor]]:
    """The loader's batches, with other tokens in every first document or not, and with ids or ends of documents."""

    def batches() -> Iterator[dict[str, Tensor]]:
        while loader is not None:
            batch = next(loader)
            tokens = batch["tokens"].clone()
            assert bool((tokens[:, DOCUMENT - 1] == EOD).all())
            if change:
                tokens[:, : DOCUMENT - 1] = (tokens[:, : DOCUMENT - 1] + 50) % EOD
            ids = {"document_ids": (torch.arange(SEQ) >= DOCUMENT).long().repeat(len(tokens), 1)} if told else {}
            yield {**batch, **ids, "tokens": tokens % EOD if told else tokens}

    return batches()


def second_documents_twice(argv: list[str], layout: tuple[int, int], told: bool) -> list[dict[str, list[Tensor]]]:
    return [second_documents(argv, layout, change, told) for change in (False, True)]


POSITIONS = {"rope": ["--position-embedding-type", "rope"], "learned": []}
LAYOUTS = {"alone": (1, 1), "PP 3": (1, 3), "TP 2, PP 2": (2, 2)}
PAIRS = [("alone", "rope"), ("alone", "learned"), ("PP 3", "rope"), ("PP 3", "learned"), ("TP 2, PP 2", "rope")]


@pytest.mark.parametrize(("name", "positions"), grid(PAIRS, quick=[("alone", "rope"), ("PP 3", "learned")]))
def test_no_second_document_sees_the_first(data: Path, name: str, positions: str) -> None:
    """Bit for bit, in every pass, on every stage; without the flags the same change is seen."""
    layout = LAYOUTS[name]
    argv = [*ON_DATA, "--num-layers", "6", "--num-refinement-blocks", "3", "--num-latent-refinements", "1",
            "--data-path", str(data / "a"), "--global-batch-size", "8", *POSITIONS[positions]]  # fmt: skip
    resets = ["--reset-attention-mask", "--reset-position-ids"]
    for flags, equal in ((resets, True), ([], False)):
        told = positions == "rope"
        ranks = run_distributed(
            second_documents_twice, layout[0] * layout[1], [*argv, *flags], layout, told, timeout=120
        )
        for rank, (first, second) in enumerate(ranks):
            assert len(first["passes"]) == 4 * 3 * 2  # micro-batches, blocks, passes of a block
            is_last = rank >= layout[0] * (layout[1] - 1)
            assert len(first["logits"]) == len(first["halting"]) == (4 * 3 if is_last else 0)
            for what in first:
                for one, other in zip(first[what], second[what], strict=True):
                    assert torch.equal(one, other) is equal, (rank, what)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.grid
def test_runs_with_all_flags_at_once_train_in_every_layout(data: Path, tmp_path: Path) -> None:
    """All flags at once, evaluated at another micro-batch size. Only data-parallel runs start from the same weights."""
    still = ["--hidden-dropout", "0", "--attention-dropout", "0"]
    flags = [*RESETS["all"], "--eval-iters", "1", "--eval-interval", "3", "--eval-micro-batch-size", "1",
             "--eval-global-batch-size", "8", "--global-batch-size", "16", "--num-layers", "3", *still,
             "--data-path", "3", str(data / "a"), "1", str(data / "b"), "--split", "80,10,10",
             "--data-cache-path", str(data / "cache")]  # fmt: skip
    losses = {}
    for name, sizes in {"alone": [], "TP 2": ["--tensor-model-parallel-size", "2", "--padded-vocab-size", "128"],
                        "DP 2": [], "PP 3": ["--pipeline-model-parallel-size", "3"]}.items():  # fmt: skip
        folder = tmp_path / name
        world = 1 if name == "alone" else int(name[-1])
        start = ["--metrics-file", str(folder / "metrics.jsonl"), *sizes]
        said = train(*start, *flags, world_size=world, flags=ON_DATA)
        assert said is None, (name, said)
        losses[name] = losses_of(folder)
        assert len(losses[name]) == 6 and losses[name][6] < losses[name][1]
    assert losses["DP 2"][1] == pytest.approx(losses["alone"][1], rel=1e-5)
    assert losses["DP 2"][6] == pytest.approx(losses["alone"][6], rel=1e-5)


@pytest.mark.grid
def test_full_validation_reads_one_set_whole_and_the_test_set_as_asked(data: Path, tmp_path: Path) -> None:
    at = ON_DATA.index("--split")
    flags = [*ON_DATA[:at], *ON_DATA[at + 2 :], "--full-validation", "--eval-iters", "2"]
    for split, name in (("train", "a"), ("valid", "b"), ("test", "c")):
        flags += [f"--{split}-data-path", str(data / name)]
    assert train(*save_to(tmp_path), "--eval-interval", "3", flags=flags) is None
    (*valid, _), (test,) = records_of(tmp_path, "valid"), records_of(tmp_path, "test")
    assert [record["iteration"] for record in valid] == [3] and test["iteration"] == 6 and "set" not in valid[0]


def _micro_batches_of_evaluations(sets: bool, whole: bool) -> list[int]:
    """Of each iteration of Megatron's ``evaluate``, over 3 replicas; and the batch size that it leaves."""
    import megatron.training
    from megatron.training import training

    from megatron_recursive.training.patches import observing

    seen = list[int]()
    run = Namespace(full_validation=whole, multiple_validation_sets=sets, eval_global_batch_size=24,
                    eval_micro_batch_size=2, data_parallel_size=3, gtp_weight_remat_size=1, cuda_graph_impl="none",
                    moe_expert_rank_capacity_factor=None, seq_length=16, decoder_seq_length=None, eval_iters=9,
                    empty_unused_memory_level=0, exit_duration_in_mins=None, consumed_valid_samples=0,
                    generate_interval=None)  # fmt: skip
    model = Namespace(eval=lambda: None, train=lambda: None, pg_collection=Namespace(pp=torch.distributed.group.WORLD))
    with pytest.MonkeyPatch.context() as patch:
        for module in (megatron.training, training):
            patch.setattr(module, "get_args", lambda: run)
        patch.setattr(training, "get_timers", MagicMock)
        patch.setattr(training, "get_rerun_state_machine", MagicMock)
        patch.setattr(training, "get_forward_backward_func", lambda **_: (
            lambda num_microbatches, **_: seen.append(num_microbatches)))  # fmt: skip
        for name in ("train", "training_log", "evaluate", "evaluate_and_print_results"):
            patch.setattr(training, name, getattr(training, name))
        observing.install(run, MagicMock())
        training.evaluate(None, None, [model], None, Namespace(timers=None), eval_iters=2)
    return [*seen, run.eval_global_batch_size]


def test_full_validation_reads_each_set_once_and_not_once_per_micro_batch() -> None:
    """Its iterations are batches of its loader, of one sample a replica; others are of --eval-global-batch-size."""
    assert run_distributed(_micro_batches_of_evaluations, 1, True, True) == [[1, 1, 24]]
    for sets, whole in ((False, True), (False, False)):  # the test set of --full-validation, and without it
        assert run_distributed(_micro_batches_of_evaluations, 1, sets, whole) == [[4, 4, 24]]


def test_a_blend_without_weights_that_is_too_short_is_refused(data: Path) -> None:
    said = train("--data-path", data / "a", data / "b", *HUNDRED, flags=ON_DATA)
    assert said is not None and "holds 178 samples" in said and "needs 400" in said and said.endswith("iterations.")


REFUSED = {
    "--reset-position-ids --position-embedding-type rope": "--reset-position-ids has no effect on rotary positions",
    "--dataloader-inter-document-masking": "--dataloader-inter-document-masking",
    "--reset-attention-mask --allow-ambiguous-pad-tokens": "--allow-ambiguous-pad-tokens may hide",
    "--per-dataset-sequences-path nowhere.json": "--per-dataset-sequences-path nowhere.json cannot be read",
}


def test_what_cannot_work_is_refused() -> None:
    for (flags, expected), said in zip(REFUSED.items(), refusals([flags.split() for flags in REFUSED]), strict=True):
        assert expected in said and said.endswith("."), (flags, said)
