"""``--distill-prepare``: what a teacher says of the training samples of a command, written once."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch.utils.data import default_collate

from megatron_recursive.data.teacher_files import TeacherFiles
from megatron_recursive.data.work_folder import LOCK, holding
from megatron_recursive.errors import UserError
from megatron_recursive.losses.distillation import vocab_parallel_log_softmax
from megatron_recursive.models.documents import Documents
from megatron_recursive.training import console
from megatron_recursive.training.distillation import DistillationSource, facts_of, opened
from megatron_recursive.training.forward_step import get_batch
from megatron_recursive.training.supervision_steps import samples_read


def prepare(args: argparse.Namespace, source: DistillationSource, datasets_provider: Callable[..., Any]) -> None:
    """Ask the teacher of every training sample. The folder gets its name when it is complete."""
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

    initialize_megatron()
    update_train_iters(args)
    wanted = get_train_valid_test_num_samples()
    (train, *_), samples, micro = datasets_provider(wanted), samples_read(args, wanted[0]), args.micro_batch_size
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    teacher: Any = source.loaded(args.padded_vocab_size, args.params_dtype, group).teacher
    kept, target = min(args.distill_top_k, opened(source.path).arch.vocab_size), Path(args.distill_prepare)
    partial, held = target.with_name(f"{target.name}.partial"), contextlib.ExitStack()
    try:
        if args.rank == 0:
            held.enter_context(holding(partial, f"--distill-prepare {target}"))
            for old in {*partial.iterdir()} - {partial / LOCK}:
                old.unlink()
            TeacherFiles.create(partial, facts_of(args), samples, args.seq_length, kept)
        torch.distributed.barrier()
        files = TeacherFiles(partial, mode="r+")
        for first in range(0, samples, micro * ranks):
            rows = [min(first + rank * micro + number, samples - 1) for number in range(micro)]  # all batches are full
            batch: Any = get_batch(None if train is None else iter([default_collate([train[row] for row in rows])]))
            with torch.no_grad():
                logits = teacher(batch["tokens"], batch["position_ids"], Documents.of(batch["document_ids"])).float()
                log_q = vocab_parallel_log_softmax(logits / args.distill_temperature, group)
                log_q = gather_from_tensor_model_parallel_region(log_q, group)
                top, ids = log_q.topk(kept)
                rest = log_q.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            if train is not None:
                values = (each.cpu().numpy() for each in (batch["tokens"], ids, torch.cat([top, rest], -1)))
                for row, *said in zip(rows, *values, strict=True):
                    files.write(row, *said)
            if args.rank == 0 and first // (micro * ranks) % 1000 == 0:
                console.say(f"{target}: {first:,} of {samples:,} samples")
        files.flush()
        torch.distributed.barrier()
        if args.rank == 0:
            os.rename(partial, target)
            (target / LOCK).unlink()
            console.say(f"{target}: {samples:,} samples; train with --distill-from {target}")
    except OSError as error:
        raise UserError(f"--distill-prepare {target} cannot be written ({error.strerror}); name another.") from error
    finally:
        held.close()
    torch.distributed.destroy_process_group()
