import gzip
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import dill
import numpy
import pytest
import sentencepiece
from datatrove.pipeline.base import PipelineStep
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_recursive.data import preprocess as preprocess_module
from megatron_recursive.data.executors import LocalExecutor, build_executor
from megatron_recursive.data.indexed import check_indexed_dataset
from megatron_recursive.data.preparation import read_preparation, vocabulary_digest
from megatron_recursive.data.preprocess import Options, preprocess
from megatron_recursive.data.tokenizer import TokenizerChoice, load_encoder, load_tokenizer, store_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import WorkFolder
from megatron_recursive.errors import UserError
from tests.distributed import processes_with
from tests.grids import grid

ROOT = Path(__file__).parents[3]
TEXTS = [f"Document {n} says {'again and ' * (n % 7)}that the loss falls." for n in range(200)]
LINES = [json.dumps({"text": text}) for text in TEXTS[:100] + ["  "] + TEXTS[100:]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.jsonl").write_text("\n".join(LINES), "utf-8")
    train_tokenizer([folder], folder / "tok", 320)
    return folder


@pytest.fixture(scope="module")
def written(corpus):
    preprocess([corpus / "train.jsonl"], corpus / "sub" / "one", corpus / "tok")
    return corpus / "sub" / "one"


@pytest.fixture
def many_processes(monkeypatch):
    """Take even a small corpus as large enough for several processes."""
    monkeypatch.setattr(preprocess_module, "SMALL_BYTES", 0)


def contents(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read(prefix):
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_megatron_reads_the_tokens_back(corpus, written):
    tokenizer = load_tokenizer(corpus / "tok")
    dataset = IndexedDataset(str(written))
    assert dataset.index.dtype == numpy.uint16
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert read(written) == [
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in TEXTS
    ]
    assert names(written.parent) == ["one.bin", "one.idx", "one.idx.json"]


@pytest.mark.parametrize(("workers", "part_bytes"), [
    pytest.param(1, 2500, marks=pytest.mark.grid), pytest.param(2, 4000, marks=pytest.mark.grid), (3, None)
])  # fmt: skip
def test_the_files_do_not_depend_on_workers_and_parts(corpus, written, tmp_path, many_processes, workers, part_bytes):
    options = Options(part_bytes=part_bytes)
    summary = preprocess([corpus / "train.jsonl"], tmp_path / "two", corpus / "tok", workers=workers, options=options)
    assert summary.documents == len(TEXTS)
    assert summary.tokens * 2 == summary.files[0].stat().st_size
    assert contents(tmp_path / "two") == contents(written)
    assert names(tmp_path) == ["two.bin", "two.idx", "two.idx.json"]


def test_no_append_eod_and_another_key(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "ab"}\n')
    with_eod = preprocess([tmp_path], tmp_path / "x", corpus / "tok", json_key="body")
    without = preprocess([tmp_path], tmp_path / "x", corpus / "tok", json_key="body", overwrite=True,
                         options=Options(append_eod=False))  # fmt: skip
    assert without.tokens == with_eod.tokens - 1
    check_indexed_dataset(tmp_path / "x")


@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_of_the_tokenizer_are_those_of_inference(corpus, tmp_path, ends):
    from tokenizers import processors

    tokenizer = load_tokenizer(corpus / "tok")
    around = "<|endoftext|> $A" + " <|endoftext|>" * ends
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_text('{"text": "the loss falls"}\n')
    (plain,) = read(_prepared(tmp_path / "plain", tmp_path, special_tokens=False))
    (special,) = read(_prepared(tmp_path / "special", tmp_path))
    seen = load_tokenizer(tmp_path / "tok")("the loss falls")["input_ids"]
    assert special == (seen if ends else [*seen, 0]) == [0, *plain] and plain[-1] == 0
    assert [read_preparation(tmp_path / name).special_tokens for name in ("plain", "special")] == [False, True]
    with pytest.raises(UserError, match="with another tokenizer or options"):
        _prepared(tmp_path / "special", tmp_path, special_tokens=False)
    stored = store_tokenizer(TokenizerChoice(str(tmp_path / "tok")), tmp_path)
    assert load_encoder(stored)(["", "a"]) == [[], load_tokenizer(tmp_path / "tok")("a")["input_ids"]]


def test_an_end_token_in_a_text_is_counted(corpus, tmp_path):
    texts = ["the loss falls", "a<|endoftext|>b", "<|endoftext|>b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = preprocess([tmp_path / "a.jsonl"], tmp_path / "x", corpus / "tok")
    assert [tokens.count(0) for tokens in read(tmp_path / "x")] == [1, 2, 2]
    ((why, count),) = made.statistics.dropped.items()
    assert count == 2 and "the end-of-document token is written out" in why


def _prepared(prefix, folder, **options):
    preprocess([folder / "a.jsonl"], prefix, TokenizerChoice(str(folder / "tok"), **options))
    return prefix


def test_gpt2_files_give_the_same_tokens(corpus, written, tmp_path):
    choice = TokenizerChoice(vocab_file=str(corpus / "tok/vocab.json"), merge_file=str(corpus / "tok/merges.txt"))
    preprocess([corpus / "train.jsonl"], tmp_path / "x", choice)
    assert contents(tmp_path / "x") == contents(written)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.grid), 2])
@pytest.mark.grid
def test_sentencepiece(corpus, tmp_path, many_processes, workers):
    trained = train_tokenizer([corpus / "train.jsonl"], tmp_path / "sp", 300, kind="sentencepiece")
    model = trained.folder / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for tokenizer in (model, trained.folder):
        preprocess([corpus / "train.jsonl"], tmp_path / "x", tokenizer, workers=workers, overwrite=True,
                   options=Options(part_bytes=3000))  # fmt: skip
        assert read(tmp_path / "x") == [[*processor.encode(text), processor.eos_id()] for text in TEXTS]


def test_a_mistake_leaves_an_earlier_dataset_alone(corpus, written, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").write_bytes(written.with_suffix(suffix).read_bytes())
    (tmp_path / "bad.jsonl").write_text("\n".join([*LINES[:100], "{", *LINES]))
    with pytest.raises(UserError, match="bad.jsonl:101 is not valid JSON"):
        preprocess([tmp_path / "bad.jsonl"], tmp_path / "train", corpus / "tok", overwrite=True)
    assert contents(tmp_path / "train") == contents(written)
    assert names(tmp_path) == ["bad.jsonl", "train.bin", "train.idx"]


def test_a_long_text_is_said_to_become_several_documents(corpus, tmp_path, capsys, monkeypatch):
    for module in ("preprocess", "readers", "sources"):
        monkeypatch.setattr(f"megatron_recursive.data.{module}.TEXT_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_text("red green\n" * 2)
    assert preprocess([tmp_path / "a.txt"], tmp_path / "x", corpus / "tok", workers=1).documents == 2
    assert f"{tmp_path}/a.txt: text of more than 4 MiB becomes several documents" in capsys.readouterr().err


def test_what_is_there_is_only_overwritten_on_request(corpus, tmp_path, capsys):
    """The same command again is done already; another one is refused, and so are files of another program."""
    (tmp_path / "a.jsonl").write_text("\n".join(LINES[:20]))
    first = preprocess([tmp_path / "a.jsonl"], tmp_path / "x", corpus / "tok")
    before = contents(tmp_path / "x")
    assert preprocess([tmp_path / "a.jsonl"], tmp_path / "x", corpus / "tok") == first
    assert "was made by this command already" in capsys.readouterr().err
    other = {"options": Options(append_eod=False)}
    for inputs, more in (([corpus / "train.jsonl"], {}), ([tmp_path / "a.jsonl"], other)):
        with pytest.raises(UserError, match="is there already, made of other documents.* add --overwrite"):
            preprocess(inputs, tmp_path / "x", corpus / "tok", **more)
    assert contents(tmp_path / "x") == before
    (tmp_path / "x.idx.json").unlink()
    with pytest.raises(UserError, match="is there already, made otherwise"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "x", corpus / "tok")
    assert names(tmp_path) == ["a.jsonl", "x.bin", "x.idx"]
    preprocess([corpus / "train.jsonl"], tmp_path / "x", corpus / "tok", overwrite=True)
    assert len(read(tmp_path / "x")) == len(TEXTS)


def test_the_record_says_which_tokenizer_it_was(corpus, written, tmp_path):
    made, tokenizer = read_preparation(written), load_tokenizer(corpus / "tok")
    assert (made.vocab_size, made.documents, made.tokenizer) == (320, len(TEXTS), str(corpus / "tok"))
    assert made.vocabulary == vocabulary_digest({**tokenizer.get_vocab(), "<added>": 320}, 320)
    swapped = {token: {5: 6, 6: 5}.get(number, number) for token, number in tokenizer.get_vocab().items()}
    assert made.vocabulary != vocabulary_digest(swapped, 320)
    for name in ("one.bin", "one.idx.json"):
        (tmp_path / name).write_bytes((written.parent / name).read_bytes())
    with open(tmp_path / "one.bin", "ab") as stream:  # another program wrote the files anew
        stream.write(b"\x00\x00")
    assert read_preparation(tmp_path / "one") is None


@pytest.mark.grid
def test_skipped_documents_are_counted_and_complete_parts_kept(corpus, written, tmp_path, many_processes):
    broken = [*LINES[:100], "{", *LINES[100:], '{"text": 3}']
    (tmp_path / "bad.jsonl").write_text("\n".join(broken))
    arguments = {"inputs": [tmp_path / "bad.jsonl"], "prefix": tmp_path / "x", "tokenizer": corpus / "tok",
                 "options": Options(part_bytes=1000)}  # fmt: skip
    with pytest.raises(UserError, match="bad.jsonl:101 is not valid JSON"):
        preprocess(**arguments)
    work = WorkFolder(tmp_path / "x.partial")
    kept = {rank: work.part(rank).with_suffix(".bin").stat().st_mtime_ns for rank in work.completed()}
    assert len(kept) > 3
    with pytest.raises(UserError, match="bad.jsonl:101 is not valid JSON"):
        preprocess(**arguments)
    assert {rank: work.part(rank).with_suffix(".bin").stat().st_mtime_ns for rank in kept} == kept
    arguments["options"] = Options(part_bytes=1000, on_error="skip")
    summary = preprocess(**arguments, workers=2)
    assert contents(tmp_path / "x") == contents(written)
    assert summary.skipped == 2
    assert [each["first"].split(" ")[0] for each in summary.statistics.malformed] == [
        f"{tmp_path}/bad.jsonl:{line}" for line in (101, len(broken))
    ]
    assert names(tmp_path) == ["bad.jsonl", "x.bin", "x.idx", "x.idx.json"]


@pytest.mark.grid
def test_parts_of_other_inputs_are_not_taken(corpus, tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text("\n".join([*LINES, "{"]))
    with pytest.raises(UserError, match="is not valid JSON"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "x", corpus / "tok", options=Options(part_bytes=1000))
    (tmp_path / "a.jsonl").write_text("\n".join(LINES[:50]))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "x", corpus / "tok", options=Options(part_bytes=1000))
    assert "starting anew" in capfd.readouterr().err
    assert len(read(tmp_path / "x")) == 50


def test_refusals(corpus, tmp_path, monkeypatch):
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        preprocess([tmp_path], tmp_path / "x", corpus / "tok")
    with pytest.raises(UserError, match="tokenizer folder .* does not exist"):
        preprocess([corpus / "train.jsonl"], tmp_path / "x", tmp_path / "none")
    with pytest.raises(UserError, match="--workers 0"):
        preprocess([corpus], tmp_path / "x", corpus / "tok", workers=0)
    with pytest.raises(UserError, match="without .bin"):
        preprocess([corpus], tmp_path / "x.bin", corpus / "tok")
    with pytest.raises(UserError, match="cannot write"):
        preprocess([corpus / "train.jsonl"], tmp_path / "blank.txt" / "x", corpus / "tok")
    assert names(tmp_path) == ["blank.txt"]


def test_two_runs_with_one_output_are_refused(corpus, tmp_path):
    from megatron_recursive.data.work_folder import locked

    with locked(WorkFolder(tmp_path / "x.partial"), "x"):
        with pytest.raises(UserError, match="another run is writing --output"):
            preprocess([corpus / "train.jsonl"], tmp_path / "x", corpus / "tok")
    assert names(tmp_path) == ["x.partial"]
    preprocess([corpus / "train.jsonl"], tmp_path / "x", corpus / "tok")
    assert names(tmp_path) == ["x.bin", "x.idx", "x.idx.json"]


def _preprocess_with_little_room(bytes_a_file, folder, prefix):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
    try:
        preprocess([folder / "train.jsonl"], prefix, folder / "tok", options=Options(part_bytes=4000))
    except UserError as error:
        os._exit(7 if "cannot write" in str(error) else 1)
    os._exit(0)


@pytest.mark.parametrize("bytes_a_file", [600, 4000])
def test_no_room_leaves_nothing_under_a_final_name(corpus, written, tmp_path, bytes_a_file):
    """600 bytes do not hold a part, 4000 hold each part but not what they are joined into."""
    small = tmp_path / "corpus"
    small.mkdir()
    (small / "train.jsonl").write_text("\n".join(LINES))
    (small / "tok").symlink_to(corpus / "tok")
    assert written.with_suffix(".bin").stat().st_size > 4000
    # fork: the child has Megatron imported already.
    child = multiprocessing.get_context("fork").Process(
        target=_preprocess_with_little_room, args=(bytes_a_file, small, tmp_path / "x")
    )
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    preprocess([small / "train.jsonl"], tmp_path / "x", small / "tok", options=Options(part_bytes=4000))
    assert contents(tmp_path / "x") == contents(written)
    assert names(tmp_path) == ["corpus", "x.bin", "x.idx", "x.idx.json"]


@pytest.mark.grid
def test_a_killed_run_goes_on_from_its_complete_parts(corpus, tmp_path):
    text = "\n".join(json.dumps({"text": f"{n} " + TEXTS[n % 200] * 20}) for n in range(16_000))
    (tmp_path / "big.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a first file, packed"}\n'))
    (tmp_path / "big.jsonl").write_text(text)  # one file, which both workers read
    assert len(text) > preprocess_module.SMALL_BYTES
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", tmp_path / "big.jsonl.gz",
               tmp_path / "big.jsonl", "--output", tmp_path / "x", "--tokenizer", corpus / "tok",
               "--workers", "2"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KILL_MARK": str(tmp_path)}
    work = WorkFolder(tmp_path / "x.partial")
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 180
        while len(work.completed()) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    with pytest.raises(UserError, match="x.bin does not exist"):
        check_indexed_dataset(tmp_path / "x")
    deadline = time.monotonic() + 20
    while processes_with(f"KILL_MARK={tmp_path}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(f"KILL_MARK={tmp_path}") == []

    kept = {rank: work.part(rank).with_suffix(".bin").stat().st_mtime_ns for rank in work.completed()}
    made = []
    inputs = [tmp_path / "big.jsonl.gz", tmp_path / "big.jsonl"]
    run = LocalExecutor.run

    def noting(self):
        run(self)
        made.append({rank: work.part(rank).with_suffix(".bin").stat().st_mtime_ns for rank in kept})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExecutor, "run", noting)
        preprocess(inputs, tmp_path / "x", corpus / "tok", workers=2)
    assert made == [kept]
    check_indexed_dataset(tmp_path / "x")  # tests/functional_tests/test_faults.py compares it with an undisturbed run's
    assert names(tmp_path) == ["big.jsonl", "big.jsonl.gz", "x.bin", "x.idx", "x.idx.json"]


class Troubled(PipelineStep):
    """A step that fails at one task, in one of the ways of ``how``."""

    type, name = "test", "troubled"

    def __init__(self, how):
        super().__init__()
        self.how = how

    def run(self, data=None, rank=0, world_size=1):
        if rank == 1 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and self.how == "refuses":
            raise UserError("this part is bad")
        if rank == 0 and self.how == "refuses":
            time.sleep(300)


@pytest.mark.parametrize(("how", "said"), grid([("killed", "a worker was killed"), ("refuses", "this part is bad")],
                                               quick=[]))
def test_a_worker_that_dies_or_fails_ends_the_run(tmp_path, how, said):
    executor = build_executor("local", [Troubled(how)], 4, 2, tmp_path / "logs", {})
    start = time.monotonic()
    with pytest.raises(UserError, match=said):
        executor.run()
    assert time.monotonic() - start < 100


def scripts(folder):
    """A SLURM cluster's commands, as far as submitting goes: what is submitted is kept in the folder."""
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\nn=$(ls {folder} | grep -c job)\nfor last; do :; done\ncp "$last" {folder}/job$n\n'
        f'echo "$@" > {folder}/args$n\necho "Submitted batch job $((n + 40))"\n'
    )
    (folder / "scontrol").write_text("#!/bin/sh\necho node1\n")
    for name in ("sbatch", "scontrol"):
        (folder / name).chmod(0o755)


@pytest.mark.grid
def test_slurm_jobs_make_the_same_files(corpus, written, tmp_path, monkeypatch):
    scripts(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    options = {"partition": "cpu", "time": "01:00:00", "mem_per_cpu_gb": "4", "qos": "low"}
    arguments = {"inputs": [corpus / "train.jsonl"], "prefix": tmp_path / "x", "tokenizer": corpus / "tok",
                 "workers": 3, "options": Options(part_bytes=3000), "executor": "slurm",
                 "executor_options": options}  # fmt: skip
    assert preprocess(**arguments) is None
    work = WorkFolder(tmp_path / "x.partial")
    tasks = work.count_parts()
    assert tasks > 4
    job = (tmp_path / "bin" / "job0").read_text()
    for line in ("partition=cpu", "time=01:00:00", "mem-per-cpu=4G", "qos=low", f"array=0-{tasks - 1}%3"):
        assert f"#SBATCH --{line}\n" in job
    assert f'export PATH="{Path(sys.executable).parent}:$PATH"' in job
    assert f"launch_pickled_pipeline {work.logs}/executor.pik" in job
    joining = [n for n in range(4) if "datatrove-join/executor.pik" in (tmp_path / "bin" / f"job{n}").read_text()]
    assert any("--dependency=afterok:40" in (tmp_path / "bin" / f"args{n}").read_text() for n in joining)

    # What the cluster would do: each task of the array, then the last job.
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    for folder, count in (("datatrove", tasks), ("datatrove-join", 1)):
        for rank in range(count):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            dill.loads((work.path / folder / "executor.pik").read_bytes()).run()
    assert contents(tmp_path / "x") == contents(written)


def test_a_second_run_on_a_cluster_is_joined_too(corpus, tmp_path, monkeypatch):
    scripts(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    text, work = tmp_path / "a.jsonl", WorkFolder(tmp_path / "x.partial")
    for documents in (3, 5):
        text.write_text("\n".join(LINES[:documents]))
        preprocess([text], tmp_path / "x", corpus / "tok", executor="slurm", overwrite=True,
                   executor_options={"partition": "cpu", "time": "1"})  # fmt: skip
        jobs = [file for file in (tmp_path / "bin").glob("job*") if "datatrove-join/executor.pik" in file.read_text()]
        assert jobs, documents
        for job in (tmp_path / "bin").glob("job*"):
            job.unlink()
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_NODELIST", "node1")
            patch.setenv("SLURM_ARRAY_TASK_ID", "0")
            for folder in ("datatrove", "datatrove-join"):
                dill.loads((work.path / folder / "executor.pik").read_bytes()).run()
        assert read_preparation(tmp_path / "x").documents == documents


def test_ray_is_configured(corpus, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="ray is not installed; install it with pip install ray"):
        preprocess([corpus / "train.jsonl"], tmp_path / "x", corpus / "tok", executor="ray")
    assert names(tmp_path) == []
    monkeypatch.setattr("megatron_recursive.data.executors.require_packages", lambda *names: None)
    executor = build_executor("ray", [Troubled("")], 7, 3, tmp_path / "logs", {"mem_per_cpu_gb": "2.5", "time": "60"})
    assert (executor.world_size, executor.workers, executor.mem_per_cpu_gb, executor.time) == (7, 3, 2.5, 60)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("local", {"partition": "cpu"}, "--executor-options are for --executor slurm and ray"),
        ("slurm", {}, "--executor slurm needs partition"),
        ("slurm", {"partition": "cpu"}, "--executor slurm needs time"),
        ("slurm", {"partition": "cpu", "time": "1"}, "needs sbatch"),
        ("slurm", {"colour": "red"}, "colour is no option of datatrove's SlurmPipelineExecutor"),
        ("slurm", {"tasks": "3"}, "tasks is no option"),
        ("slurm", {"cpus_per_task": "two"}, "cpus_per_task=two must be a int"),
    ],
)
def test_wrong_executor_options_are_named(tmp_path, kind, options, said):
    with pytest.raises(UserError, match=said):
        build_executor(kind, [Troubled("")], 2, 1, tmp_path / "logs", options)


@pytest.mark.grid
def test_the_command_reports(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", "a.jsonl", "--output", "x"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*more):
        return subprocess.run([*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    both = run("--tokenizer", corpus / "tok", "--vocab-file", "v")
    assert (both.returncode, both.stderr) == (
        2, "error: give either --tokenizer, or both --vocab-file and --merge-file\n",
    )  # fmt: skip
    done = run("--tokenizer", corpus / "tok", "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"1 malformed  is not valid JSON; the first: {tmp_path}/a.jsonl:2 is not valid JSON" in done.stdout
    counts = {"documents": 1, "tokens": len(read(tmp_path / "x")[0]), "skipped": 1}
    assert counts.items() <= json.loads(lines[-1]).items()
