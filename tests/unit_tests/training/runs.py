"""Tiny training runs for the tests of this folder: in a pool worker (no import to wait for) or as a real command."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed import REPOSITORY, run_distributed
from tests.distributed_worker import reset_megatron
from tests.quick_start import FEW, start_quickly

SCRIPT = REPOSITORY / "examples" / "recursive_gpt" / "pretrain_recursive_gpt.py"

# A vocabulary of 127 is padded to 128 under TP 1, but would be padded to 256 under TP 2.
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 1e-2 --lr-warmup-iters 1 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --eval-iters 0 --eval-interval 100 --log-interval 1 "
    "--split 90,5,5 --num-workers 0 --lr-decay-iters 9"
).split()
RECURSION = ["--num-refinement-blocks", "2", "--num-latent-refinements", "1"]
PLAIN = ["--disable-recursive-refinement"]
TIMES = ("time", "seconds", "tokens per second")
PATCHED = (
    "training_log", "evaluate", "evaluate_and_print_results", "load_checkpoint", "save_checkpoint", "train",
    "report_theoretical_memory", "num_floating_point_operations", "get_megatron_optimizer",
    "get_optimizer_param_scheduler", "train_step",
)  # fmt: skip


def in_worker(argv: list[str], mock_documents: int = FEW) -> str | None:
    """What the entry script does, in a process that has Megatron imported, on fewer mock documents.

    Returns:
        None, or the sentence that the run ended with.
    """
    from megatron.core.datasets import utils
    from megatron.training import training

    from megatron_recursive.errors import UserError
    from megatron_recursive.training import pretrain

    start_quickly(mock_documents)
    utils.compile_helpers = _make  # as in a process of its own, before a run patches it
    # Left by an earlier job on this worker; a rank without would skip an all-reduce that the others wait in.
    training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
    sys.argv = [str(SCRIPT), *argv]
    try:
        pretrain._run()
    except UserError as error:
        return str(error)
    except SystemExit as stop:  # --exit-interval
        assert not stop.code, stop
    return None


def _make() -> None:
    raise AssertionError("Megatron runs make, for which its wheel has no Makefile")


def train(
    *argv: str | Path, recursion: Sequence[str] = RECURSION, flags: Sequence[str] = FLAGS, world_size: int = 1,
    mock_documents: int = FEW,
) -> str | None:  # fmt: skip
    """Train the tiny model; later flags win. Returns None, or the sentence of a refusal."""
    words = [*flags, *recursion, *map(str, argv)]
    return run_distributed(in_worker, world_size, words, mock_documents=mock_documents, timeout=120)[0]


def refusals(
    commands: Sequence[Sequence[str | Path]], recursion: Sequence[str] = RECURSION, flags: Sequence[str] = FLAGS
) -> list[str]:
    """The sentences that :func:`train` would return for runs that end in one, all of them in one job."""
    words = [[*flags, *recursion, *map(str, each)] for each in commands]
    return [str(said) for said in run_distributed(one_by_one, 1, words, timeout=120)[0]]


def one_by_one(commands: list[list[str]]) -> list[str | None]:
    """:func:`in_worker` for each, from Megatron's state after its import."""
    said = []
    for argv in commands:
        said.append(in_worker(argv))
        reset_megatron()
    return said


def save_to(folder: Path, every: int = 3) -> list[str]:
    """Flags of a run that saves, and that resumes when it is started again."""
    return ["--save", str(folder), "--load", str(folder), "--save-interval", str(every)]


def metrics_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Iteration to all numbers of ``metrics.jsonl`` but times, at full precision; a repeated iteration: the last."""
    trained = {record["iteration"]: record for record in records_of(folder, "train")}
    return {n: {name: v for name, v in record.items() if name not in TIMES} for n, record in trained.items()}


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in the order of ``metrics.jsonl``."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def losses_of(folder: Path) -> dict[int, float]:
    return {iteration: record["lm loss"] for iteration, record in metrics_of(folder).items()}


def copy_checkpoint(source: Path, target: Path, iteration: int) -> None:
    """Make a checkpoint folder that holds one iteration of another."""
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, but for the logs, which a run begins before it is refused."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.parent.name != "logs"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def entries_of(folder: Path) -> set[str]:
    """Every key of an iteration folder, tensors and objects (such as ``_extra_state``)."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def tensors_of(folder: Path) -> dict[str, Any]:
    """The tensors of an iteration folder by their key, read by torch alone."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def stock_gpt_in_worker(argv: list[str], our_layers: bool = False) -> None:
    """Train Megatron's GPT as a program without this package would: its arguments, its config, its builder.

    ``our_layers`` gives it this package's local layer spec, whose attention kernel rounds differently.
    """
    from megatron.core.enums import ModelType
    from megatron.training import arguments, training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from megatron_recursive.training.forward_step import datasets_provider, forward_step
    from megatron_recursive.training.patches import wheel

    start_quickly()
    for name in PATCHED:
        function = getattr(training, name)  # an earlier job on this worker wrapped it
        setattr(training, name, getattr(function, "__wrapped__", function))
    training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
    local = (
        "--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion "
        "--no-gradient-accumulation-fusion --distributed-backend gloo --no-create-attention-mask-in-dataloader"
    )
    sys.argv = ["stock", *argv, *local.split()]
    args = arguments.parse_args()
    arguments.validate_args(args, {})
    set_global_variables(args)
    wheel.install()
    gpt = gpt_config_from_args(args)
    if our_layers:
        gpt.transformer_layer_spec = _our_layers
    config = pretrain_cfg_container_from_args(args, gpt)
    training.pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


def _our_layers(config: Any, vp_stage: int | None = None) -> Any:
    from megatron_recursive.models.layer_specs import local_block_spec

    return local_block_spec(config.transformer, vp_stage)
