"""``--distill-from``: the loss also pulls towards a teacher's logits, of a model on the last stage or prepared ones."""

from __future__ import annotations

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_recursive.accounting import count_parameters, flops_per_token
from megatron_recursive.data.preparation import vocabulary_digest
from megatron_recursive.data.teacher_files import FACTS, TeacherFiles
from megatron_recursive.errors import UserError
from megatron_recursive.losses.distillation import Distillation, Teacher, TopTokens
from megatron_recursive.models.checkpoint_integrity import check_integrity
from megatron_recursive.plan import build_plan
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.training.tokenizer_check import known_vocabulary, was_another

# name: default, what a value must be, test of it, metavar, help
NUMBERS: dict[str, tuple[Any, str, Any, str]] = {
    "distill_weight": (0.5, "above 0 and at most 1", lambda w: 0 < w <= 1, "Share of the teacher in the objective"),
    "distill_temperature": (1.0, "positive", lambda t: 0 < t < math.inf, "Divides the logits of teacher and model"),
    "distill_top_k": (64, "at least 1", lambda k: k > 0, "Tokens of each position that --distill-prepare keeps"),
}


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distill-from", metavar="PATH",
        help="Train towards a teacher's logits too: (1 - weight) * language-model loss + weight * temperature^2 * "
        "KL(teacher || model). A Megatron checkpoint, a Hugging Face folder or a .gguf file, all of which stands on "
        "every replica of the last stage; or a folder of --distill-prepare.",
    )
    for name, (default, _, _, what) in NUMBERS.items():
        group.add_argument(flag_of(name), type=type(default), metavar="N", help=f"{what} (default: {default}).")
    group.add_argument(
        "--distill-prepare", metavar="DIR",
        help="Train nothing, but write what the teacher says of the training samples of this command. Data-parallel "
        "ranks share them.",
    )


def has_teacher(args: argparse.Namespace) -> bool:
    return getattr(args, "distill_from", None) is not None  # Megatron's own arguments do not have it


@functools.lru_cache(maxsize=1)
def opened(path: str) -> Any:
    """:class:`TeacherFiles`, or a Donor of ``hf/convert/teacher.py``."""
    try:
        if (Path(path) / FACTS).is_file():
            return TeacherFiles(Path(path))
        from megatron_recursive.hf.convert.teacher import open_donor

        return open_donor(path)
    except UserError as error:
        raise UserError(f"--distill-from: {error}") from error


def settle_distillation(args: argparse.Namespace) -> None:
    """Fill in what is not given, and refuse what cannot be. The tokenizer is there."""
    given = {name: getattr(args, name) for name in (*NUMBERS, "distill_prepare") if getattr(args, name) is not None}
    if args.distill_from is None:
        for name in given:
            raise UserError(f"{flag_of(name)} needs --distill-from, a teacher.")
        return
    for name, (default, what, fits, _) in NUMBERS.items():
        setattr(args, name, given.get(name, default))
        if not fits(getattr(args, name)):
            raise UserError(f"{flag_of(name)} must be {what}, but is {getattr(args, name)}.")
    if args.distill_prepare is None and (args.train_only or not args.enable_recursive_refinement):
        other = "--train-only" if args.train_only else "--disable-recursive-refinement"
        raise UserError(f"--distill-from is for the layers of a recursive model; leave it or {other} out.")
    if args.distill_prepare is not None and args.pipeline_model_parallel_size > 1:
        raise UserError("--distill-prepare asks a teacher on one stage; give --pipeline-model-parallel-size 1.")
    teacher = opened(args.distill_from)
    (_check_files if isinstance(teacher, TeacherFiles) else _check_donor)(teacher, args)


def facts_of(args: argparse.Namespace) -> dict[str, str]:
    """What prepared logits depend on beside their samples."""
    names = ("vocab_size", "distill_temperature", "seq_length", "reset_position_ids", "reset_attention_mask")
    return {"tokenizer": str(args.tokenizer_identity), **{name: str(getattr(args, name)) for name in names}}


def _check_files(files: TeacherFiles, args: argparse.Namespace) -> None:
    if args.distill_prepare is not None:
        raise UserError(f"--distill-prepare asks a model, but --distill-from {files.folder} is no model; name one.")
    for name, mine in facts_of(args).items():
        theirs = files.facts.get(name)
        if theirs != mine:
            what = "another tokenizer" if name == "tokenizer" else f"{flag_of(name)} {theirs} (this run: {mine})"
            raise UserError(f"--distill-from {files.folder} was prepared with {what}; give the same, or prepare anew.")


def _check_donor(donor: Any, args: argparse.Namespace) -> None:
    reads = args.rank == 0 or torch.distributed.is_initialized()  # where it is, every rank calls the check
    if donor.checkpoint is not None and args.verify_integrity is not False and reads:
        check_integrity(donor.checkpoint)
    arch, tp, said = donor.arch, args.tensor_model_parallel_size, f"--distill-from {args.distill_from}"
    if any(size % tp for size in (arch.num_query_groups, arch.num_attention_heads, arch.ffn_hidden_size)):
        raise UserError(f"{said}: --tensor-model-parallel-size {tp} does not divide its {arch.num_attention_heads} "
                        f"heads, {arch.num_query_groups} query groups and MLP of {arch.ffn_hidden_size}.")  # fmt: skip
    if args.seq_length > arch.max_positions:
        raise UserError(f"{said} has {arch.max_positions} positions, fewer than --seq-length {args.seq_length}.")
    mine, theirs = known_vocabulary(), donor.tokenizer and donor.tokenizer.get_vocab()
    same = arch.vocab_size == args.vocab_size
    if mine is not None and theirs is not None:
        ours, other = (vocabulary_digest(each, min(arch.vocab_size, args.vocab_size)) for each in (mine, theirs))
        same = arch.vocab_size <= args.padded_vocab_size and (ours == other or args.allow_other_tokenizer)
    elif not args.allow_other_tokenizer and was_another(donor.args):
        same = False
    if not same:
        raise UserError(f"{said} has another tokenizer, of {arch.vocab_size} (this run: {args.vocab_size}); give "
                        "that one with --tokenizer-model, or another teacher.")  # fmt: skip


@dataclass(frozen=True)
class DistillationSource:
    """What the flags say, for the model's builder and for accounting."""

    path: str
    weight: float
    temperature: float

    def loaded(self, rows: int, dtype: torch.dtype, group: ProcessGroup) -> Distillation:
        """The teacher and how much it counts. ``rows``: of the padded vocabulary."""
        return Distillation(self._teacher(rows, dtype, group), self.weight, self.temperature)

    def _teacher(self, rows: int, dtype: torch.dtype, group: ProcessGroup) -> Teacher:
        source = opened(self.path)
        if isinstance(source, TeacherFiles):
            return functools.partial(_look_up, source)
        model = source.build(rows, dtype, group.rank(), group.size())
        beyond = max(source.arch.vocab_size - group.rank() * (rows // group.size()), 0)

        def ask(input_ids: Tensor, position_ids: Tensor, documents: Any) -> Tensor:
            logits_BSV: Tensor = model(input_ids, position_ids, None, packed_seq_params=documents)
            logits_BSV[..., beyond:] = -torch.inf
            return logits_BSV

        return ask

    def costs(self, seq_length: int) -> tuple[int, float]:
        """Parameters of a teacher in memory, and FLOPs of its forward per token."""
        if isinstance(source := opened(self.path), TeacherFiles):
            return 0, 0.0
        about = source.arch.shape(seq_length), build_plan(source.recursion)
        return count_parameters(*about).held, flops_per_token(*about).forward

    def describe(self, args: argparse.Namespace) -> str:
        """For the start of a run."""
        parameters, flops = self.costs(args.seq_length)
        size = parameters * args.params_dtype.itemsize / args.tensor_model_parallel_size
        held = f"{parameters:,} parameters, {size / 1e6:,.1f} MB on a rank of the last stage"
        where = f"{held}; {flops:.4g} FLOPs a token" if parameters else "read from disk"
        return f"weight {self.weight:g}, temperature {self.temperature:g}, from {self.path} ({where})"


def source_of(args: argparse.Namespace) -> DistillationSource | None:
    """None without a teacher."""
    if not has_teacher(args):
        return None
    return DistillationSource(args.distill_from, args.distill_weight, args.distill_temperature)


def _look_up(files: TeacherFiles, input_ids: Tensor, *_: Any) -> TopTokens:
    ids, log_probs = (torch.from_numpy(array).to(input_ids.device) for array in files.read(input_ids.cpu().numpy()))
    return TopTokens(ids.long(), log_probs.float().log_softmax(-1))


def check_samples(args: argparse.Namespace, train: Any, samples: int) -> None:
    """Refuse other data before the first step, by the first and the last sample."""
    if args.distill_prepare is None and isinstance(files := opened(args.distill_from), TeacherFiles):
        tokens = torch.stack([torch.as_tensor(train[number]["tokens"]) for number in (0, samples - 1)])
        hidden = tokens >= (args.answer_tokens or args.padded_vocab_size)  # as the model reads them
        files.read(tokens.masked_fill(hidden, 0).numpy())
