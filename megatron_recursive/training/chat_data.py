"""``--chat-data``: training on conversations that ``prepare-chat`` wrote; ``--train-epochs``, of any data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron.core.datasets.utils import Split

from megatron_recursive.data.chat.dataset import ChatRows, chat_lengths
from megatron_recursive.data.indexed import all_lengths, check_indexed_dataset
from megatron_recursive.data.joining import TOKENIZER
from megatron_recursive.data.splits import MEGATRONS_SPLIT, split_bounds
from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.training import console
from megatron_recursive.training.refusals import refuse_empty_splits

# Flags of plain text, or of what reads it.
OF_TEXT = (
    "data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path",
    "mock_data", "per_dataset_sequences_path", "reset_attention_mask", "reset_position_ids", "eod_mask_loss",
    "answer_tokens", "full_validation", "multiple_validation_sets",
)  # fmt: skip


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    add = parser.add_argument_group("conversations, epochs and the best checkpoint").add_argument
    add("--chat-data", metavar="PREFIX",
        help="Train on conversations that prepare-chat wrote: packed into rows of --seq-length, kept apart, and the "
        "loss only on what the assistant says, each token alike. The tokenizer is the data's unless another is given.")
    add("--valid-chat-data", metavar="PREFIX",
        help="Conversations to evaluate on, all of --chat-data being trained on. Without it --split takes some away. "
        "Every evaluation reads the same rows, at most --eval-iters batches of them.")
    add("--train-epochs", type=int, metavar="N", action=_InPlaceOfIterations,
        help="In the place of a --train-iters before it: read each conversation of --chat-data N times, or each token "
        "of one --data-path (or --train-data-path) as far as it fills batches.")
    add("--keep-best", action="store_true",
        help="Keep the checkpoint of the lowest held-out loss in the folder best below --save, whichever are deleted. "
        "Every evaluation reads the same samples.")
    # fmt: on


class _InPlaceOfIterations(argparse.Action):
    """Later flags win; the file of an import has --train-iters."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.train_epochs, namespace.train_iters = values, None


def is_chat(args: argparse.Namespace) -> bool:
    return getattr(args, "chat_data", None) is not None  # Megatron's own arguments do not have it


def settle_chat(args: argparse.Namespace) -> None:
    """Refuse what contradicts conversations, and fill in what follows from them; iterations from epochs."""
    if args.chat_data is not None:
        _settle_conversations(args)
    elif args.valid_chat_data is not None:
        raise UserError("--valid-chat-data needs --chat-data, the conversations to train on.")
    if args.keep_best and (args.save is None or not args.eval_iters or args.async_save or args.skip_train):
        raise UserError(
            "--keep-best needs --save, and evaluations (--eval-iters, and a held-out part of --split) while it trains; "
            "it excludes --async-save."
        )
    if args.train_epochs is not None:
        _settle_epochs(args)


def _settle_conversations(args: argparse.Namespace) -> None:
    for name in OF_TEXT:
        if getattr(args, name):
            raise UserError(f"{flag_of(name)} and --chat-data exclude each other; leave one of them out.")
    if args.dataloader_type == "cyclic":
        raise UserError("--dataloader-type cyclic has its own order, but --chat-data one by epochs; leave it out.")
    args.calculate_per_token_loss = True  # micro-batches have different numbers of supervised tokens
    if args.tokenizer_type is None and args.tokenizer_model is None:
        args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", f"{args.chat_data}{TOKENIZER}"
    _, *held_out = (_rows(args, split, 0) for split in Split)
    batches = [-(-rows.rows // (args.eval_global_batch_size or _batch(args))) for rows in held_out if rows is not None]
    args.eval_iters = min(args.eval_iters, max(batches, default=0))


def _batch(args: argparse.Namespace) -> int:
    replicas = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    return int(args.global_batch_size or args.micro_batch_size * replicas)


def _settle_epochs(args: argparse.Namespace) -> None:
    """Sets ``train_iters``."""
    if args.train_epochs < 1:
        raise UserError(f"--train-epochs is {args.train_epochs}; give a positive number.")
    for name in ("train_iters", "train_samples", "step_batch_size_schedule", "carry_halted"):
        if getattr(args, name):
            raise UserError(f"--train-epochs and {flag_of(name)} exclude each other; leave one of them out.")
    batch, text = _batch(args), args.data_path or args.train_data_path or []
    if (rows := _rows(args, Split.train, 0) if is_chat(args) else None) is not None:
        batches = -(-args.train_epochs * rows.rows // batch)
    elif len(text) != 1 or "://" in text[0]:
        raise UserError("--train-epochs needs --chat-data, or --data-path with one prefix on this machine.")
    else:
        check_indexed_dataset(text[0])
        lengths, split = all_lengths(text[0]), args.split or MEGATRONS_SPLIT if args.data_path else "1"
        tokens = int(lengths[: split_bounds(split, len(lengths))[1]].sum(dtype="i8"))
        batches = (args.train_epochs * tokens - 1) // args.seq_length // batch
        if not batches:
            raise UserError(f"{text[0]} has {tokens} tokens to train on, which fill no batch of {batch} samples in "
                            f"--train-epochs {args.train_epochs}; give a smaller batch, or more data.")  # fmt: skip
    args.train_iters = batches * args.num_supervision_steps


def _rows(args: argparse.Namespace, split: Split, wanted: int) -> ChatRows | None:
    """One of the splits; None where it has no sample."""
    trains, apart = split is Split.train, args.valid_chat_data is not None
    name = "valid_chat_data" if apart and not trains else "chat_data"
    flag, prefix = flag_of(name), getattr(args, name)
    try:
        lengths = chat_lengths(prefix)
    except UserError as error:
        raise UserError(f"{flag} {prefix}: {str(error).rstrip('.')}.") from error
    if (longest := int(lengths.max())) > args.seq_length + 1:
        raise UserError(f"{flag} {prefix} has a sample of {longest} tokens, for which --seq-length {args.seq_length} "
                        f"is too short; give --seq-length {longest - 1}, or prepare the data for less.")  # fmt: skip
    bounds = [0, len(lengths), len(lengths)] if trains else [0, 0, len(lengths), len(lengths)]
    if not apart:
        refuse_empty_splits(flag, prefix, args.split)
        bounds = split_bounds(args.split or MEGATRONS_SPLIT, len(lengths))
    first, last = bounds[split.value : split.value + 2]
    if first == last:
        return None
    evaluation = None if trains else max(args.eval_iters, 1) * (args.eval_global_batch_size or _batch(args))
    return ChatRows(prefix, lengths, (first, last), args.seq_length, args.seed, split, wanted,
                    epochs=args.train_epochs if trains else None, evaluation=evaluation)  # fmt: skip


def chat_datasets(args: argparse.Namespace, wanted: Sequence[int]) -> tuple[Any, Any, Any]:
    """The three splits; ``wanted`` are the rows that the run reads of each."""
    train, valid, test = (_rows(args, split, rows) if rows else None for split, rows in zip(Split, wanted, strict=True))
    for split, rows in zip(Split, (train, valid, test), strict=True):
        if rows is not None and args.rank == 0:
            what = f"{rows.rows} rows of {args.seq_length} tokens, {rows.fill:.1%} full"
            console.say(f"> conversations ({split.name}): {what}")
    return train, valid, test
