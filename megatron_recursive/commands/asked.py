"""The model and its training as flags, or --model with them, describe it: for plan, count and plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_recursive.accounting import Recording, StateBytes, padded_rows
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans, build_plan
from megatron_recursive.plan.knobs import TRAINED, flag_of, knobs_in
from megatron_recursive.plan.recursion_config import add_recursion_arguments, renewed, retrofit, stored_knobs

if TYPE_CHECKING:
    from megatron_recursive.pipeline.layouts import Job

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
SIZES = (*NEEDED, "ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings")
SWITCHES = ("swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights")
CHOICES = {"normalization": ("LayerNorm", "RMSNorm"), "position_embedding_type": ("learned_absolute", "rope", "none"),
           "norm_placement": ("pre", "post", "sandwich"), "qk_norm_scope": ("head", "full")}  # fmt: skip
DEFAULTS = {"vocab_size": 32768, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute"}


class Model(NamedTuple):
    """A model as it is described, without its weights.

    Attributes:
        rows: of the embedding: in a folder the true ones, in Megatron the padded ones.
        values: as a checkpoint stores them. own: the plan of a folder of ours, which no knobs may tell.
    """

    source: str
    arch: Architecture
    rows: int
    dtype: str
    values: dict[str, Any]
    own: RecursionPlan | None = None


def add_model(parser: argparse.ArgumentParser, model: Any) -> None:
    """--model and Megatron's flags of a model into a group of the parser, those of its recursion into their own."""
    # fmt: off
    model.add_argument("--model", metavar="DIR_OR_CKPT", help="a Hugging Face folder (its config.json suffices), a "
                       ".gguf file, a name in the hub's cache, or a Megatron checkpoint")
    for name in (*SIZES, *CHOICES, *SWITCHES):
        kind: dict[str, Any] = {"type": int} if name in SIZES else {"choices": CHOICES.get(name)}
        told = f" (default: {DEFAULTS[name]})" if name in DEFAULTS else ""
        model.add_argument(flag_of(name), default=argparse.SUPPRESS, help=f"as in training{told}",
                           **({"action": "store_true"} if name in SWITCHES else kind))
    model.add_argument("--seq-length", type=int, help="default: the checkpoint's, or 4096 and at most the model's")
    add_recursion_arguments(parser, TRAINED, only_given=True)  # the rest is the source's own
    # fmt: on


def add_model_and_job(parser: argparse.ArgumentParser, model: Any) -> Any:
    """As :func:`add_model`, and the group of the model's training, which is returned."""
    # fmt: off
    add_model(parser, model)
    job = parser.add_argument_group("training")
    job.add_argument("--micro-batch-size", type=int, help="default: the checkpoint's, or 1")
    job.add_argument("--global-batch-size", type=int, help="default: the checkpoint's, or 4 micro-batches a GPU")
    job.add_argument("--bf16", action="store_true", help="weights in bf16, Adam in fp32 (default: all in fp32)")
    job.add_argument("--use-distributed-optimizer", action="store_true", help="spread Adam's states over DP")
    job.add_argument("--recompute-passes", action="store_true", help="keep one hidden tensor a pass, replay the pass")
    job.add_argument("--recompute-granularity", choices=("full",), help="replay layer by layer")
    job.add_argument("--pipeline-window", type=int, metavar="N", help="micro-batches of a window of two phases at most")
    # fmt: on
    return job


def check(args: argparse.Namespace) -> None:
    knobs = knobs_in(vars(args))
    for name, value in vars(args).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and name not in knobs
        if is_number and not 0 < value <= (1 if name == "mfu" else 1e15):
            raise UserError(f"{flag_of(name)} must be positive{' and at most 1' * (name == 'mfu')}, but is {value}.")
    if "gpus_per_node" in args and args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(f"--gpus {args.gpus} fill no nodes of --gpus-per-node {args.gpus_per_node}; change either.")


def given_sizes(args: argparse.Namespace) -> dict[str, Any]:
    return {name: vars(args)[name] for name in (*SIZES, *CHOICES, *SWITCHES) if name in vars(args)}


def open_model(args: argparse.Namespace) -> Model:
    """The model of --model or of flags."""
    given, name = given_sizes(args), args.model
    if name is None:
        values = _values_of_flags(args, given)
        arch = Architecture.from_megatron(values, "The model")
        rows = padded_rows(arch.vocab_size, args.tp or 1)
        return Model("flags", arch, rows, "bfloat16" if args.bf16 else "float32", values)
    if given:
        raise UserError(f"{flag_of(next(iter(given)))} is decided by the model of --model; leave out either.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint, iteration_folder

        checkpoint = TorchDistCheckpoint(iteration_folder(Path(name)))
        values, dtype = checkpoint.arguments(), checkpoint.dtypes.get("embedding.word_embeddings.weight", "float32")
        arch = Architecture.from_megatron(values, name)
        return Model("checkpoint", arch, arch.padded_vocab_size, str(dtype).removeprefix("torch."), values)
    from megatron_recursive.hf.convert.sources import cached_folder, open_source

    if Path(name).suffix == ".gguf":
        config, arch, theirs = (source := open_source(name)).config, source.arch, dict[str, Any]()
    else:
        config, arch, theirs = open_config(Path(name) if Path(name).is_dir() else cached_folder(name))
    dtype, own = str(config.dtype or "float32").removeprefix("torch."), getattr(config, "recursion_plan", None)
    return Model("Hugging Face", arch, arch.vocab_size, dtype, {**arch.to_megatron(), **theirs}, own)


def recursion_of(model: Model, knobs: dict[str, Any], *, trains: bool) -> RecursionConfig:
    """A model's recursion with the flags that are given; ``trains``: as a run has it that starts from the model."""
    stated = stored_knobs(model.values)
    if model.source == "Hugging Face":
        stated = stated or retrofit(knobs, model.arch.num_layers)  # as convert import does
    elif model.source == "checkpoint" and not trains:
        stated |= {"grow_depth_at": None, "grow_rewarm_iters": 0}  # its own depth
        if stated.get("enable_recursive_refinement") is None and not knobs:  # of Megatron's own training
            stated = {"enable_recursive_refinement": False}
    return RecursionConfig.from_mapping(renewed(stated, knobs))


def steps_of(arch: Architecture, recursion: RecursionConfig, iterations: int | None = None) -> StepPlans:
    config = recursion.resolved(embedding_init_std=arch.init_std)
    return StepPlans(config, build_plan(config), seed=None, iterations=iterations)


def steps_as_it_is(model: Model, knobs: dict[str, Any]) -> StepPlans:
    """Of a donor without recursion flags, a plain model."""
    if model.source == "Hugging Face" and not knobs and (model.own or not knobs_in(model.values)):
        return StepPlans(RecursionConfig(), model.own or RecursionPlan.plain())
    return steps_of(model.arch, recursion_of(model, knobs, trains=False))


def _values_of_flags(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    missing = [flag_of(name) for name in NEEDED if name not in given]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; describe the model, or name one with --model.")
    values = {**DEFAULTS, "max_position_embeddings": args.seq_length or 4096, **given}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if (hidden % heads and "kv_channels" not in given) or heads % given.get("num_query_groups", 1):
        raise UserError("--num-attention-heads must divide --hidden-size and be divided by --num-query-groups.")
    values.setdefault("ffn_hidden_size", int(hidden * 8 / 3 / 64) * 64 if "swiglu" in given else 4 * hidden)
    return values | {"group_query_attention": "num_query_groups" in given, "padded_vocab_size": values["vocab_size"],
                     "add_bias_linear": "disable_bias_linear" not in given}  # fmt: skip


def complete_job(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """What is not given is the checkpoint's, or a default."""
    args.seq_length = args.seq_length or values.get("seq_length") or min(4096, values["max_position_embeddings"])
    args.micro_batch_size = args.micro_batch_size or values.get("micro_batch_size") or 1
    batch = args.global_batch_size or values.get("global_batch_size")
    args.global_batch_size = batch or 4 * args.gpus * args.micro_batch_size
    args.bf16 = bool(args.bf16 or values.get("bf16"))


def open_config(folder: Path) -> tuple[Any, Architecture, dict[str, Any]]:
    """transformers' config of a folder, what its config.json says, and its recursion; no weights are read."""
    from megatron_recursive.hf.convert.configs import family_of, read_config
    from megatron_recursive.hf.convert.sources import config_object, open_source, read_json

    values = read_json(folder / "config.json")
    family = family_of(values, str(folder))
    if family.told_by_tensors:
        source = open_source(str(folder))
        return source.config, source.arch, source.config.recursion
    config = config_object(family, values, str(folder))
    own = {} if family.recursion is None else family.recursion.knobs(config, str(folder))
    return config, read_config(family, config, str(folder)), getattr(config, "recursion", own)


def job_of(args: argparse.Namespace, arch: Architecture, plan: RecursionPlan, **settings: Any) -> Job:
    from megatron_recursive.pipeline.layouts import Job

    # As with Transformer Engine on a GPU: fused norms and activations; no dropout.
    recording = Recording(
        args.micro_batch_size, element=2 if args.bf16 else 4, rotary=arch.positions == "rope",
        recompute_passes=args.recompute_passes, recompute_layers=int(args.recompute_granularity is not None),
    )  # fmt: skip
    return Job(
        arch.shape(args.seq_length), plan, args.gpus, global_batch=args.global_batch_size, recording=recording,
        state=StateBytes() if args.bf16 else StateBytes(4, 4, 8), distributed_optimizer=args.use_distributed_optimizer,
        window=args.pipeline_window or 0, **settings,
    )  # fmt: skip
