"""Megatron's arguments and ours: defaults that fit the machine, refusals in one sentence, validation."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import linecache
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from megatron.training import arguments as megatron_arguments
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import get_tokenizer, rebuild_tokenizer, set_global_variables

from megatron_recursive.backends import cpu, device
from megatron_recursive.errors import UserError
from megatron_recursive.models.gradient_fusion import APEX_KERNEL
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.plan.knobs import DEPTHS, flag_of
from megatron_recursive.plan.recursion_config import add_recursion_arguments, initial_std
from megatron_recursive.training import help_text, profiling, refusals, refused_features, tokenizer_check
from megatron_recursive.training.architecture import take_function
from megatron_recursive.training.chat_data import add_chat_arguments, settle_chat
from megatron_recursive.training.checkpoint_folders import (
    checkpoint_to_read,
    reading_only,
    refuse_missing,
    refuse_overwriting,
)
from megatron_recursive.training.checkpointing import check_vocabulary, saved_arguments
from megatron_recursive.training.console import STYLES
from megatron_recursive.training.data_stream import add_stream_arguments, refuse_stream
from megatron_recursive.training.distillation import add_distillation_arguments, settle_distillation
from megatron_recursive.training.lora import add_lora_arguments, refuse_lora, take_adapters
from megatron_recursive.training.norm_arguments import add_norm_arguments, refuse_norms
from megatron_recursive.training.optimizer_arguments import add_optimizer_arguments, refuse_optimizers, settle_rates
from megatron_recursive.training.patches import gpt2_tokenizer
from megatron_recursive.training.ranges import restrict_numbers
from megatron_recursive.training.samples import add_sample_arguments, refuse_samples
from megatron_recursive.training.schedule_check import refuse_schedule_values
from megatron_recursive.training.supervision_steps import refuse_supervision

MEGATRON_INIT_STD = 0.02


def parse_arguments() -> tuple[argparse.Namespace, RecursionConfig]:
    """Parse and validate the command line, and set Megatron's global state (arguments, tokenizer, writers).

    Returns:
        The arguments, which also carry the resolved recursion knobs (so that checkpoints store them), and the knobs.

    Raises:
        UserError: one sentence on what is wrong.
    """
    with megatron_speaks_in_sentences():
        args = megatron_arguments.parse_args(_add_arguments)
    if not args.use_checkpoint_args:  # which says the family
        RecursionConfig.from_mapping(vars(args))  # refuses bad knobs before anything else is looked at
    if args.tokenizer_type is None and args.vocab_file is not None and args.merge_file is not None:
        args.tokenizer_type = "GPT2BPETokenizer"  # as Megatron's own GPT script
    refuse_optimizers(args)
    refused_features.refuse_features(args, on_cpu=cpu.is_installed())
    folder, from_plain_gpt = checkpoint_to_read(args)
    if (args.exit_on_missing_checkpoint and folder is None) or (
        args.ckpt_step is not None and (folder is None or from_plain_gpt)
    ):
        flag = "--exit-on-missing-checkpoint" if args.ckpt_step is None else "--ckpt-step"
        there = "it is missing" if args.load is None else f"{args.load} holds none"
        raise UserError(f"{flag} needs a checkpoint in --load, but {there}.")
    refuse_missing(args, folder)
    refuse_overwriting(args, folder, from_plain_gpt=from_plain_gpt)
    if args.use_checkpoint_args:
        _take_checkpoint_arguments(args)
    refused_features.refuse_activations(args)
    refusals.refuse_shapes(args)
    refuse_norms(args)
    refuse_lora(args)
    refuse_samples(args)
    if args.step_batch_size_schedule is not None and args.eval_global_batch_size is None:
        args.eval_global_batch_size = refusals.scheduled_batches(args)[-1]
    refuse_stream(args)
    settle_chat(args)
    if args.answer_tokens is not None:
        args.calculate_per_token_loss = True  # micro-batches may have different numbers of answers
    if args.calculate_per_token_loss and args.ddp_average_in_collective:
        said = next((flag_of(name) for name in ("chat_data", "answer_tokens") if getattr(args, name) is not None),
                    "--calculate-per-token-loss")  # fmt: skip
        raise UserError(f"--ddp-average-in-collective does not go with {said}, which divides by the batch's tokens; "
                        "leave it out.")  # fmt: skip
    refusals.refuse_schedule(args)
    refuse_supervision(args)
    refuse_schedule_values(args)
    refusals.refuse_tokenizer(args)
    refusals.refuse_data(args)
    refusals.refuse_output(args)
    profiling.check(args, on_cpu=cpu.is_installed())
    if args.init_from_gpt is not None:
        args.pretrained_checkpoint = args.init_from_gpt  # Megatron's name for "weights only, start at iteration 0"
    recursion = _resolve_recursion(args)
    plan = build_plan(recursion)
    settle_rates(args, plan.heads_only() if args.train_only else plan, recursion)
    if args.train_only and recursion.enable_deep_supervision and "enable_deep_supervision" in _given_knobs():
        raise UserError("--enable-deep-supervision says nothing under --train-only heads, which trains nothing by the "
                        "language-model loss; leave it out.")  # fmt: skip
    freezing = {"--train-only": args.train_only, "--lora-rank": args.lora_rank}
    for flag, value in freezing.items() if folder is None else ():
        if value is not None:
            raise UserError(f"{flag} {value} leaves all other weights as they are; give those of a model, with --load "
                            "DIR or --init-from-gpt DIR.")  # fmt: skip
    with megatron_speaks_in_sentences(args):
        megatron_arguments.validate_args(args, {})
        if args.step_batch_size_schedule is not None:  # what is told of a step is the last one's
            args.global_batch_size = refusals.scheduled_batches(args)[-1]
        set_global_variables(args, build_tokenizer=False)
    profiling.place_trace(args)
    asked = args.padded_vocab_size  # the tokenizer's builder puts Megatron's own figure there
    with _tokenizer_errors(args):
        if gpt2_tokenizer.is_asked_for(args):
            gpt2_tokenizer.install(args)
        else:
            rebuild_tokenizer(args)
    tokenizer_check.note_tokenizer(args)
    _set_padded_vocabulary(args, asked)
    tokenizer_check.check_data(args)
    settle_distillation(args)
    return args, recursion


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.fromfile_prefix_chars = "@"  # @FILE: a flag a line, such as an import from Hugging Face writes
    upstream = list(parser._action_groups)
    restrict_numbers(parser)
    (yaml,) = (action for action in parser._actions if action.dest == "yaml_cfg")
    yaml.type = _refuse_yaml  # Megatron would read the file, in place of all flags, before anybody is asked
    add_recursion_arguments(parser)
    add_norm_arguments(parser)
    add_sample_arguments(parser)
    add_optimizer_arguments(parser)
    add_distillation_arguments(parser)
    add_chat_arguments(parser)
    add_stream_arguments(parser)
    add_lora_arguments(parser)
    group = parser.add_argument_group("recursive runs")
    group.add_argument(
        "--init-from-gpt", metavar="DIR",
        help="Start from the weights of a plain GPT checkpoint; what a GPT does not have starts fresh. A checkpoint "
        "in --load takes precedence, so that a resumed run goes on.",
    )
    group.add_argument(
        "--override-recursion-depth", action="store_true",
        help="Load a checkpoint that was trained with other --num-refinement-blocks, --num-latent-refinements or "
        "--num-recurrences.",
    )
    group.add_argument(
        "--train-only", choices=("heads",),
        help="Train the head that the recursion adds (halting head or exit gate) and freeze all other weights: no pass "
        "is recorded. From a checkpoint of all weights start with --finetune, into another --save.",
    )
    group.add_argument(
        "--device", choices=device.CHOICES, default=device.default(),
        help="Train on GPUs (cuda), on CPUs on purpose (cpu), or on GPUs unless no host of the job has one (auto). "
        f"Without the flag {device.VARIABLE} of the environment is asked.",
    )
    group.add_argument(
        "--pipeline-phases", choices=("auto", "one", "two"), default="auto",
        help="Over pipeline stages, run the grad-free blocks forward-only before the rest, window by window (two), or "
        "all passes in one schedule (one); auto takes the one that is faster by simulation.",
    )
    group.add_argument(
        "--pipeline-window", type=int, default=0, metavar="N",
        help="Micro-batches of a window of two phases at most, all of whose states are held at once (default: four a "
        "stage).",
    )
    group.add_argument(
        "--recompute-passes", action="store_true",
        help="Keep only the input of each pass with gradient and replay the pass in the backward: one hidden tensor a "
        "pass instead of all activations. May be combined with --recompute-granularity.",
    )
    group.add_argument(
        "--metrics-file", metavar="FILE",
        help="Append every logged and evaluated metric to this file, a JSON object a line "
        "(default: metrics.jsonl in --save).",
    )
    group.add_argument(
        "--log-style", choices=STYLES,
        help="What stdout shows: a line an interval and a table an evaluation (compact), or Megatron's own lines "
        "(megatron). All else goes to a log file beside the run. Default: compact on a terminal.",
    )
    group.add_argument(
        "--no-verify-integrity", dest="verify_integrity", action="store_false",
        help="Neither write checksums of a checkpoint's files (default: up to 10 GB) nor check those that are there.",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable", dest="dist_ckpt_optim_fully_reshardable", action="store_false",
        help="Write a distributed optimizer's state in the buffers of this layout (default: so that any layout reads "
        "it, up to 10 GB of state on a rank).",
    )
    group.add_argument(
        "--allow-other-tokenizer", action="store_true",
        help="Train on data, or from a checkpoint, that was made with another tokenizer than this run's.",
    )
    group.add_argument(
        "--answer-tokens", type=int, metavar="FIRST",
        help="Token ids from this one on are answers, as in the data of megatron-recursive task: the loss and all "
        "metrics count where one is to be said, and the model reads token 0 where one stands.",
    )
    parser.set_defaults(**_machine_defaults(), verify_integrity=None, init_method_std=None,
                        dist_ckpt_optim_fully_reshardable=None)  # fmt: skip
    return help_text.describe(parser, upstream)


def _refuse_yaml(file: str) -> NoReturn:
    raise UserError(f"Recursive models do not support YAML configs (--yaml-cfg {file}) yet; give flags.")


def _machine_defaults() -> dict[str, Any]:
    """Defaults that let a command of stock Megatron flags run here unchanged."""
    has_te = not cpu.is_installed() and importlib.util.find_spec("transformer_engine") is not None
    # Causality is the attention's own, and documents are kept apart by their ids; no mask of S x S is made.
    # Without --eval-interval Megatron 0.19 fails when it counts samples; 1000 was its default before.
    defaults: dict[str, Any] = {"create_attention_mask_in_dataloader": False, "eval_interval": 1000}
    if not has_te and importlib.util.find_spec(APEX_KERNEL) is None:
        defaults["gradient_accumulation_fusion"] = False
    if not has_te:
        defaults.update(transformer_impl="local", no_persist_layer_norm=True, masked_softmax_fusion=False,
                        apply_rope_fusion=False)  # fmt: skip
    if cpu.is_installed():
        defaults.update(distributed_backend="gloo", gradient_accumulation_fusion=False)
    return defaults


def _take_checkpoint_arguments(args: argparse.Namespace) -> None:
    """--use-checkpoint-args: Megatron restores the architecture; the recursion knobs follow."""
    folder, from_plain_gpt = checkpoint_to_read(args)
    if folder is None:
        raise UserError("--use-checkpoint-args needs a checkpoint in --load or --init-from-gpt.")
    saved = saved_arguments(folder)
    with megatron_speaks_in_sentences(args), reading_only(args, folder, from_plain_gpt=from_plain_gpt):
        load_args_from_checkpoint(args, load_arg="init_from_gpt" if from_plain_gpt else "load")
    take_function(args, saved)
    take_adapters(args, saved)
    if not from_plain_gpt:
        given = _given_knobs()  # which are compared with the checkpoint's as without the flag
        for name, value in RecursionConfig.from_stored(saved).to_dict().items():
            if name not in given:
                setattr(args, name, value)


def _given_knobs(files: str | None = "@") -> set[str]:
    """The knobs that the command line names; ``files``: what files of further words begin with; None: none count."""
    parser = argparse.ArgumentParser(fromfile_prefix_chars=files, add_help=False)
    return {*vars(add_recursion_arguments(parser, only_given=True).parse_known_args()[0])}


def _resolve_recursion(args: argparse.Namespace) -> RecursionConfig:
    """Fill in the knobs left open, and store them in the arguments, which every checkpoint carries."""
    folder, is_plain_gpt = checkpoint_to_read(args)
    resumed = folder if args.enable_recursive_refinement and not is_plain_gpt else None
    if resumed is not None and args.embedding_multiplier is None:
        args.embedding_multiplier = saved_arguments(resumed).get("embedding_multiplier")
    if args.init_method_std is None:
        fresh = args.enable_recursive_refinement and args.init_from_gpt is None
        args.init_method_std = initial_std(args.hidden_size) if fresh else MEGATRON_INIT_STD
    std = args.init_method_std if args.embedding_init_method_std is None else args.embedding_init_method_std
    recursion = RecursionConfig.from_mapping(vars(args)).resolved(
        embedding_init_std=std, from_plain_gpt=args.init_from_gpt is not None
    )
    if recursion.enable_recursive_refinement:  # at the value of its default too; an import's file names every knob
        for name in sorted(_given_knobs(files=None) & {*DEPTHS, "state_init", "state_norm"}):
            recursion.refuse_foreign(name)
    for name, value in recursion.to_dict().items():
        setattr(args, name, value)
    if args.full_validation:  # of one set Megatron 0.19.2 takes a number for a list
        args.multiple_validation_sets = True
    if args.metrics_file is None and args.save is not None:
        args.metrics_file = os.path.join(args.save, "metrics.jsonl")
    return recursion


def _set_padded_vocabulary(args: argparse.Namespace, asked: int | None) -> None:
    """Fix the padded vocabulary, and record it in the arguments.

    Megatron's padding depends on the tensor-parallel size, and padding rows join the softmax: the same weights would
    give another loss at another size. So a checkpoint's own figure is kept.
    """
    known = get_tokenizer().vocab_size
    if args.vocab_size is None:
        args.vocab_size = known
    if args.vocab_size < known:
        raise UserError(f"--vocab-size {args.vocab_size} is smaller than the tokenizer's vocabulary of {known}.")
    args.padded_vocab_size, source = _padded_vocabulary(args, asked)
    padded, tp = args.padded_vocab_size, args.tensor_model_parallel_size
    if padded < args.vocab_size:
        raise UserError(f"{source} {padded} is smaller than the vocabulary of {args.vocab_size} (--vocab-size).")
    if padded % tp:
        raise UserError(f"{source} {padded} is not divisible by --tensor-model-parallel-size {tp}.")


def _padded_vocabulary(args: argparse.Namespace, asked: int | None) -> tuple[int, str]:
    """The rows of the embedding, and where the figure comes from."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    folder, _ = checkpoint_to_read(args)
    checkpoint = saved_arguments(folder) if folder is not None else {}
    saved = checkpoint.get("padded_vocab_size")
    if folder is not None and saved is not None:
        if asked is None:
            check_vocabulary(folder, checkpoint, args.vocab_size)
            tokenizer_check.check_checkpoint(folder, checkpoint, args)
        if asked not in (None, saved):
            raise UserError(f"--padded-vocab-size {asked} is not the {saved} of the checkpoint {folder}; leave it out.")
        return saved, f"The checkpoint's padded vocabulary (--padded-vocab-size, {folder}) of"
    if asked is not None:
        return asked, "--padded-vocab-size"
    if not args.pad_vocab_size:
        return args.vocab_size, "--vocab-size (unpadded, --no-pad-vocab-size)"
    tp = args.tensor_model_parallel_size
    padded = calculate_padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, tp, logging_enabled=False)
    return padded, "The padded vocabulary (--make-vocab-size-divisible-by) of"


@contextlib.contextmanager
def megatron_speaks_in_sentences(args: argparse.Namespace | None = None) -> Iterator[None]:
    """Around what reads, checks or translates flags and does no work: Megatron's assertions become one sentence."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError, NotImplementedError, ImportError, OSError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:
            given = [name for name, value in vars(args or argparse.Namespace()).items() if value == error.filename]
            text = f"{flag_of(given[0])}: {text}" if given else text
        if not text:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            rule = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            text = rule.removeprefix("assert ").rstrip(" \\,(")
        known = (name.replace("_", "[_-]") for name in vars(args or argparse.Namespace()) if "_" in name)
        names = "|".join(sorted(known, key=len, reverse=True)) or "(?!)"
        text = re.sub(rf"(?<![\w-])(?:args\.|self\.)?({names})(?!\w)", lambda found: flag_of(found[1]), text)
        raise UserError(f"Megatron refuses these flags: {text.rstrip('.')}.") from error


@contextlib.contextmanager
def _tokenizer_errors(args: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        where = args.tokenizer_model or args.vocab_file or "(no --tokenizer-model)"
        raise UserError(
            f"The tokenizer {args.tokenizer_type} at {where} cannot be loaded ({type(error).__name__}: {reason}); "
            "check --tokenizer-type and --tokenizer-model, or --vocab-file and --merge-file."
        ) from error
