"""What flags cannot be, in one sentence each, before any work is done; features: ``refused_features``."""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_recursive.command_line import command
from megatron_recursive.data.indexed import check_indexed_dataset
from megatron_recursive.data.splits import MEGATRONS_SPLIT, SPLITS, split_bounds
from megatron_recursive.data.tokenizer import is_hub_name
from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of


def refuse_shapes(args: argparse.Namespace) -> None:
    """Dimensions that do not divide."""
    tp, pp, heads = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_attention_heads
    for flag in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        value = getattr(args, flag)
        if value is None or value < 1:
            what = "is missing" if value is None else f"is {value}"
            raise UserError(f"{flag_of(flag)} {what}; give a positive number.")
    if tp < 1 or args.world_size % tp:
        raise UserError(
            f"--tensor-model-parallel-size {tp} does not divide the {args.world_size} processes of this run; "
            "start a multiple of it (--nproc-per-node)."
        )
    if pp < 1 or args.world_size % (tp * pp):
        raise UserError(
            f"--pipeline-model-parallel-size {pp} times --tensor-model-parallel-size {tp} does not divide the "
            f"{args.world_size} processes of this run; start a multiple of {tp * max(pp, 1)} "
            "(--nproc-per-node)."
        )
    if heads % tp:
        raise UserError(f"--num-attention-heads {heads} is not divisible by --tensor-model-parallel-size {tp}.")
    if args.hidden_size % heads and args.kv_channels is None:
        raise UserError(f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {heads}.")
    width, rotary = args.kv_channels or args.hidden_size // heads, args.position_embedding_type in ("rope", "yarn")
    if (rotary or args.use_rotary_position_embeddings) and int(width * args.rotary_percent) % 2:
        raise UserError(
            f"Rotary positions turn pairs, but a head of {width} (--kv-channels, or --hidden-size over "
            f"--num-attention-heads) times --rotary-percent {args.rotary_percent:g} is odd."
        )
    replicas = args.world_size // (tp * pp)
    if replicas % args.num_distributed_optimizer_instances:
        raise UserError(
            f"--num-distributed-optimizer-instances {args.num_distributed_optimizer_instances} does not divide the "
            f"{replicas} data-parallel replicas."
        )
    if args.group_query_attention and args.num_query_groups is not None:
        groups = args.num_query_groups
        if heads % groups or groups % tp:
            raise UserError(
                f"--num-query-groups {groups} must divide --num-attention-heads {heads} and be divisible by "
                f"--tensor-model-parallel-size {tp}."
            )


def refuse_schedule(args: argparse.Namespace) -> None:
    """Figures of the schedule that contradict each other; Megatron's own words for these do not name the flags."""
    if (args.train_iters is None) == (args.train_samples is None):
        raise UserError("Give either --train-iters or --train-samples.")
    positions = args.max_position_embeddings
    if positions is not None and args.seq_length > positions:
        raise UserError(f"--seq-length {args.seq_length} is larger than --max-position-embeddings {positions}.")
    replicas = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    step = args.micro_batch_size * replicas
    if args.global_batch_size is not None and args.global_batch_size % step:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not divisible by {step}, which is --micro-batch-size "
            f"{args.micro_batch_size} times the data-parallel size."
        )
    if args.rampup_batch_size is not None:
        raise UserError(
            "--rampup-batch-size has no effect in Megatron 0.19; give --step-batch-size-schedule "
            '"0:BATCH TOKENS:BATCH".'
        )
    if args.step_batch_size_schedule is not None:
        _refuse_batches(args, step)
    if args.phase_transition_iterations and args.train_samples is None:
        raise UserError("--phase-transition-iterations needs --train-samples, of which Megatron makes the last phase.")
    if args.enable_recursive_refinement and args.pipeline_model_parallel_size > 1:
        _refuse_pipeline(args, replicas)
    for flag in ("save_params_interval", "save_wgrads_interval"):
        if getattr(args, flag) and args.save is None:
            raise UserError(f"{flag_of(flag)} needs --save, the folder that it writes to.")
    if args.save is not None and not args.save_interval:
        raise UserError("--save needs --save-interval, the iterations between two checkpoints.")


def _refuse_batches(args: argparse.Namespace, step: int) -> None:
    """A schedule of batch sizes that Megatron would find wrong when it gets there, or feed too little data."""
    given = f"--step-batch-size-schedule {args.step_batch_size_schedule!r}"
    if args.global_batch_size is not None:
        raise UserError(f"{given} and --global-batch-size exclude each other; give either.")
    if args.train_samples is None:
        raise UserError(f"{given} needs --train-samples, since iterations take more and more samples; give their sum.")
    odd = [batch for batch in scheduled_batches(args) if batch % step or not batch]
    if odd:
        raise UserError(
            f"{given}: a batch of {odd[0]} is not divisible by {step}, which is --micro-batch-size "
            f"{args.micro_batch_size} times the data-parallel size."
        )


def scheduled_batches(args: argparse.Namespace) -> list[int]:
    """The batch sizes of --step-batch-size-schedule, in order."""
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator as Calculator

    try:
        steps = Calculator._parse_schedule(args.step_batch_size_schedule, args.seq_length)
    except ValueError as error:
        raise UserError(f"--step-batch-size-schedule {args.step_batch_size_schedule!r}: {_one_line(error)}.") from error
    if not steps or steps[0][0] != 0:
        raise UserError(f"--step-batch-size-schedule {args.step_batch_size_schedule!r} must begin with 0:BATCH.")
    return [batch for _, batch in steps]


def _refuse_pipeline(args: argparse.Namespace, replicas: int) -> None:
    """What the ring cannot schedule: fewer micro-batches than stages, layers that do not divide."""
    stages = args.pipeline_model_parallel_size
    split = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
             "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")  # fmt: skip
    if args.num_layers % stages and not any(getattr(args, flag) for flag in split):
        raise UserError(
            f"--num-layers {args.num_layers} is not divisible by --pipeline-model-parallel-size {stages}; say how to "
            "split with --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers."
        )
    train = args.global_batch_size or args.micro_batch_size * replicas
    flag, smallest = ("--global-batch-size", train)
    if args.step_batch_size_schedule is not None:
        flag, smallest = "--step-batch-size-schedule", min(scheduled_batches(args))
    batches = ((flag, smallest, args.micro_batch_size),
               ("--eval-global-batch-size", args.eval_global_batch_size or train,
                args.eval_micro_batch_size or args.micro_batch_size))  # fmt: skip
    for flag, batch, micro in batches:
        count = batch // (micro * replicas)
        if count < stages:
            raise UserError(
                f"{flag} {batch} makes {count} micro-batches a replica, fewer than the {stages} stages of "
                f"--pipeline-model-parallel-size; a recursion needs at least as many, so raise it to "
                f"{stages * micro * replicas} or lower the micro-batch size."
            )


def refuse_tokenizer(args: argparse.Namespace) -> None:
    """A tokenizer that is not named, or whose files are not there."""
    if args.tokenizer_type is None:
        raise UserError(
            "No tokenizer: give --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER, or "
            "--tokenizer-type NullTokenizer --vocab-size N."
        )
    if args.vocab_size is not None and args.vocab_size < 1:
        raise UserError(f"--vocab-size is {args.vocab_size}; give a positive number.")
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise UserError("--tokenizer-type NullTokenizer needs --vocab-size.")
    for flag in ("tokenizer_model", "vocab_file", "merge_file"):
        path = getattr(args, flag)
        # A Hugging Face name (org/model) may live in the hub's cache: transformers decides.
        if path is not None and not Path(path).exists() and not (flag == "tokenizer_model" and is_hub_name(path)):
            raise UserError(f"{flag_of(flag)} {path} does not exist.")
    needs_model = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "Llama2Tokenizer")
    if args.tokenizer_type in needs_model and args.tokenizer_model is None:
        raise UserError(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model.")
    if args.tokenizer_type == "GPT2BPETokenizer" and not (args.vocab_file and args.merge_file):
        raise UserError("--tokenizer-type GPT2BPETokenizer needs --vocab-file and --merge-file.")


def refuse_data(args: argparse.Namespace) -> None:
    """No data, data of which a file is missing or half written, or documents that cannot be kept apart."""
    if args.reset_attention_mask and args.allow_ambiguous_pad_tokens:
        raise UserError(
            "--allow-ambiguous-pad-tokens may hide the ends of documents, which --reset-attention-mask needs; leave "
            "either out."
        )
    rotary = args.use_rotary_position_embeddings or args.position_embedding_type in ("rope", "yarn")
    if rotary and args.reset_position_ids and not args.reset_attention_mask:
        raise UserError(
            "--reset-position-ids has no effect on rotary positions, which are relative and only end with attention; "
            "add --reset-attention-mask, or use --position-embedding-type learned_absolute."
        )
    if args.per_dataset_sequences_path is not None:
        try:
            json.loads(Path(args.per_dataset_sequences_path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--per-dataset-sequences-path {args.per_dataset_sequences_path} cannot be read as JSON "
                f"({type(error).__name__}: {_one_line(error)})."
            ) from error
    if args.multiple_validation_sets and not args.full_validation:
        raise UserError("--multiple-validation-sets needs --full-validation: each set is read once, and whole.")
    if args.mock_data:
        return
    for flag, blend in _blends(args).items() if args.full_validation else ():
        prefixes = _without_weights(flag, blend)
        if len(prefixes) < len(blend) and len(prefixes) > 1 and not re.search(r"(train|test)(-data-path)?$", flag):
            raise UserError(
                f"{flag} has weights, which mean nothing to --full-validation, since it reads every set once and "
                "whole; give --valid-data-path PREFIX ... without them."
            )
    sources = list(prefixes_of(args))
    if not sources and args.data_stream is None:
        raise UserError(
            f"No training data: give --data-path PREFIX (made by {command('preprocess')}) or --train-data-path, or "
            "--mock-data to try things out."
        )
    for flag, prefix in sources:
        try:
            check_indexed_dataset(prefix)
        except UserError as error:
            raise UserError(f"{flag} {prefix}: {str(error).rstrip('.')}.") from error
        if flag.startswith(("--data-path", "--data-args-path")) and "://" not in prefix:
            if args.split is None and not flag.startswith("--data-path"):
                raise UserError(f"{flag} needs --split, such as --split 90,10,0.")
            refuse_empty_splits(flag, prefix, args.split)


def prefixes_of(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Every dataset that Megatron will read, with the flag that it comes from."""
    for flag, blend in _blends(args).items():
        yield from ((flag, prefix) for prefix in _without_weights(flag, blend))
    for name in ("chat_data", "valid_chat_data"):
        if getattr(args, name, None) is not None:
            yield flag_of(name), getattr(args, name)


def refuse_empty_splits(flag: str, prefix: str, given: str | None) -> None:
    """A part of --split without a token: Megatron would look for its samples for ever."""
    split = MEGATRONS_SPLIT if given is None else given
    with open(f"{prefix}.idx", "rb") as stream:  # after the header, the lengths of the sequences, which Megatron splits
        documents = int.from_bytes(stream.read(34)[18:26], "little")
        bounds, parts = split_bounds(split, documents), split.replace("/", ",").split(",")
        for name, part, first, last in zip(SPLITS, parts, bounds, bounds[1:], strict=False):
            stream.seek(34 + 4 * first)
            if float(part) and not any(stream.read(4 * min(last - first, 2**20))):
                default = " (Megatron's default)" if given is None else ""
                works = "90,10,0" if documents >= 10 else f"{documents - 1},1,0" if documents > 1 else "1,0,0"
                raise UserError(
                    f"{flag} {prefix} has {documents} documents, so that --split {split}{default} leaves none for "
                    f"{name}; give --split {works}, or add documents."
                )


def _blends(args: argparse.Namespace) -> dict[str, list[str]]:
    """Every list of prefixes that Megatron will read, under the flag that it comes from."""
    split_flags = ("train_data_path", "valid_data_path", "test_data_path")
    blends = {flag_of(flag): getattr(args, flag) or [] for flag in ("data_path", *split_flags)}
    if args.data_path is not None and any(getattr(args, flag) for flag in split_flags):
        raise UserError("--data-path excludes --train-data-path, --valid-data-path and --test-data-path; give either.")
    for name in ("data_args_path", "per_split_data_args_path"):
        path, flag = getattr(args, name), flag_of(name)
        if path is None:
            continue
        try:
            text = Path(path).read_text(encoding="utf-8")
            per_split = json.loads(text) if name.startswith("per_split") else {"": text}
        except (OSError, ValueError) as error:
            raise UserError(f"{flag} {path} cannot be read ({type(error).__name__}: {_one_line(error)}).") from error
        if not isinstance(per_split, dict) or (name.startswith("per_split") and not set(SPLITS) <= set(per_split)):
            raise UserError(f"{flag} {path} must hold a JSON object with the blends of {', '.join(SPLITS)}.")
        for split, blend in per_split.items():
            parts = blend.split() if isinstance(blend, str) else blend
            blends[f"{flag} {path} {split}".rstrip()] = [str(part) for part in parts or []]
    return blends


def _without_weights(flag: str, blend: list[str]) -> list[str]:
    """The prefixes of a blend: ``PREFIX ...`` or ``WEIGHT PREFIX WEIGHT PREFIX ...`` (as Megatron tells them apart)."""
    if len(blend) % 2 == 0:
        try:
            weights = [float(weight) for weight in blend[::2]]
        except ValueError:
            weights = []
        if any(not weight > 0 or math.isinf(weight) for weight in weights):
            raise UserError(f"{flag}: the weights {' '.join(blend[::2])} must be positive; leave out what has none.")
        if weights:
            return blend[1::2]
    for part in blend:
        if _is_number(part):
            raise UserError(f"{flag}: the weight {part} has no prefix; give WEIGHT PREFIX ..., or no weights.")
    return blend


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not Path(f"{text}.idx").exists()


def refuse_output(args: argparse.Namespace) -> None:
    """A folder that cannot be written: better said now than at the first save."""
    for flag in ("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir", "logits_save_dir"):  # fmt: skip
        path = getattr(args, flag)
        if not path or "://" in str(path):
            continue
        place = Path(path).absolute()
        while not place.exists() and not place.is_symlink():
            place = place.parent
        what = "is not a folder" if not place.is_dir() else ""
        try:
            with tempfile.TemporaryFile(dir=place):  # permissions say little to root, or of /proc and full disks
                pass
        except OSError as error:
            what = what or f"does not take a file ({error.strerror})"
        if what:
            raise UserError(f"{flag_of(flag)} {path} cannot be written, since {place} {what}; name another folder.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
