"""--distill-from and --distill-prepare in whole runs."""

from __future__ import annotations

import fcntl
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_recursive.data.teacher_files import TeacherFiles
from tests.grids import grid
from tests.unit_tests.training.runs import FLAGS, copy_checkpoint, metrics_of, refusals, save_to, train
from tests.unit_tests.training.test_bad_flags import write_tokenizer

LAYOUTS = {
    "TP 2 with SP, PP 2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "DP 2": (2, "--micro-batch-size 1"),
}
STILL = "--hidden-dropout 0 --attention-dropout 0".split()
RUNS = [(source, layout) for source in ("teacher", "prepared") for layout in LAYOUTS]
HOW = ["--distill-weight", "0.6", "--distill-temperature", "1.5"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recursive model of another shape, as a checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    shape = ["--hidden-size", "48", "--num-layers", "3", "--train-iters", "3", "--lr", "1e-1"]
    assert train(*save_to(folder), *shape, recursion=["--recursion-family", "looped"]) is None
    return folder


@pytest.fixture(scope="module")
def prepared(teacher: Path) -> Path:
    files = teacher / "prepared"
    asked = ["--distill-from", teacher, *HOW[2:], "--distill-prepare", files, "--distill-top-k", "20"]
    (left := teacher / "prepared.partial").mkdir()  # by one that was killed
    (left / "keys.npy").write_text("half")
    assert train(*asked, "--micro-batch-size", "1", world_size=2) is None
    assert not left.exists() and not (files / "lock").exists()
    return files


def distilled(folder: Path, source: Path, *flags: str, ranks: int = 1) -> dict[int, dict[str, float]]:
    assert train(*save_to(folder), *STILL, "--distill-from", source, *HOW, *flags, world_size=ranks) is None
    return metrics_of(folder)


@pytest.mark.parametrize(("source", "layout"), grid(RUNS, quick=[]))
def test_layouts_and_a_resume_are_one_run(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, source: str
) -> None:
    place = request.getfixturevalue(source)
    alone = distilled(tmp_path / "alone", place)
    assert all(step["distillation loss"] > 0 for step in alone.values())
    for step in alone.values():
        mixed = 0.4 * step["lm loss"] + 0.6 * step["distillation loss"] + step["halt loss"]
        assert step["total loss"] == pytest.approx(mixed, rel=1e-5)
    copy_checkpoint(tmp_path / "alone", tmp_path / "spread", 3)
    ranks, flags = LAYOUTS[layout]
    spread = distilled(tmp_path / "spread", place, *flags.split(), ranks=ranks)
    assert sorted(spread) == [4, 5, 6]
    for number, step in spread.items():
        for name in ("lm loss", "distillation loss", "total loss", "grad norm"):
            assert step[name] == pytest.approx(alone[number][name], rel=1e-5), (number, name)


@pytest.mark.grid
def test_all_tokens_kept_are_the_teacher_itself(teacher: Path, tmp_path: Path) -> None:
    asked = ["--distill-from", teacher, *HOW[2:], "--distill-prepare", tmp_path / "all", "--distill-top-k", "500"]
    of_iterations = {"--train-iters", "--lr-decay-iters", "--lr-warmup-iters"}
    words = [w for before, w in pairwise([None, *FLAGS]) if not {before, w} & of_iterations]
    assert train(*asked, "--train-samples", "24", flags=words) is None  # as many as six iterations read
    read, computed = (distilled(tmp_path / name, at) for name, at in (("a", tmp_path / "all"), ("b", teacher)))
    for number, step in read.items():
        assert step["distillation loss"] == pytest.approx(computed[number]["distillation loss"], rel=2e-3)


def test_what_does_not_fit_is_refused_by_name(teacher: Path, prepared: Path, tmp_path: Path) -> None:
    live, read = ["--distill-from", teacher], ["--distill-from", prepared, *HOW]
    cases = {
        "--distill-weight needs --distill-from": HOW[:2],
        "--distill-prepare needs --distill-from": ["--distill-prepare", tmp_path / "x"],
        "--distill-weight must be above 0 and at most 1, but is 1.5": [*live, "--distill-weight", "1.5"],
        "--distill-temperature must be positive": [*live, "--distill-temperature", "0"],
        "leave it or --train-only out": [*live, "--train-only", "heads", "--load", teacher],
        "leave it or --disable-recursive-refinement out": [*live, "--disable-recursive-refinement"],
        "has another tokenizer, of 127 (this run: 120)": [*live, "--vocab-size", "120"],
        "16 positions, fewer than --seq-length 32": [*live, "--seq-length", "32", "--max-position-embeddings", "32"],
        "nowhere does not exist": ["--distill-from", tmp_path / "nowhere"],
        "was prepared with --distill-temperature 1.5 (this run: 1.0)": ["--distill-from", prepared],
        "was prepared with --seq-length 16 (this run: 8)": [*read, "--seq-length", "8"],
        "lacks a sample of this run": [*read, "--seed", "7"],
        "is no model; name one": [*read, "--distill-prepare", tmp_path / "x"],
        f"another run is writing --distill-prepare {tmp_path / 'x'}": [*live, "--distill-prepare", tmp_path / "x"],
    }  # fmt: skip
    (running := tmp_path / "x.partial").mkdir()
    with (running / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for sentence, said in zip(cases, refusals([*cases.values()]), strict=True):
            assert sentence in said, said
    assert [*running.iterdir()] == [running / "lock"]


def test_weights_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """A run leaves no tokenizer beside its checkpoint, but its digest in it."""
    at = FLAGS.index("--tokenizer-type")
    words = [*FLAGS[:at], *FLAGS[at + 4 :], "--make-vocab-size-divisible-by", "4", "--tokenizer-type",
             "HuggingFaceTokenizer"]  # fmt: skip
    own, other = (["--tokenizer-model", tmp_path / name] for name in ("own", "other"))
    write_tokenizer(tmp_path / "own", {f"w{number}": number for number in range(60)})
    write_tokenizer(tmp_path / "other", {f"x{number}": number for number in range(60)})
    assert train(*save_to(tmp_path / "run"), *own, "--train-iters", "1", flags=words) is None
    asked = ["--distill-from", tmp_path / "run"]
    cases = [[*asked, *other], ["--load", tmp_path / "run", *other], ["--tokenizer-model", tmp_path / "run/typo"]]
    said = refusals(cases, flags=words)
    assert "has another tokenizer, of 60 (this run: 60); give that one" in said[0]
    assert "was trained with another tokenizer" in said[1] and said[2].endswith("run/typo does not exist.")
    assert train(*asked, *own, "--train-iters", "1", flags=words) is None


@pytest.mark.grid
def test_carried_steps_ask_a_teacher_of_each_batch_once(teacher: Path, tmp_path: Path) -> None:
    """What is prepared is the samples that the run reads: two batches in six steps."""
    files, carried = tmp_path / "files", ["--num-supervision-steps", "3"]
    assert train("--distill-from", teacher, *HOW[2:], "--distill-prepare", files, *carried) is None
    assert len(TeacherFiles(files).keys) == 8
    read = distilled(tmp_path / "run", files, *carried)
    assert all(step["distillation loss"] > 0 for step in read.values())


@pytest.mark.grid
def test_a_teacher_has_the_dtype_of_the_run(teacher: Path, tmp_path: Path) -> None:
    full, half = (distilled(tmp_path / name, teacher, *flags) for name, flags in (("32", []), ("16", ["--bf16"])))
    for number, step in half.items():
        assert step["distillation loss"] == pytest.approx(full[number]["distillation loss"], rel=0.03)
