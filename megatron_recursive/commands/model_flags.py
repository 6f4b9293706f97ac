"""The model that ``plan`` and ``count`` speak of: flags, a checkpoint, or a Hugging Face folder; and its job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_recursive.accounting import Recording, StateBytes
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.recursion_config import flag_of

if TYPE_CHECKING:
    from megatron_recursive.pipeline.layouts import Job

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
SIZES = (*NEEDED, "ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings")
SWITCHES = ("swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights")
CHOICES = {"normalization": ("LayerNorm", "RMSNorm"), "position_embedding_type": ("learned_absolute", "rope", "none"),
           "norm_placement": ("pre", "post", "sandwich"), "qk_norm_scope": ("head", "full")}  # fmt: skip
DEFAULTS = {"vocab_size": 32768, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute"}


def add_model_flags(group: Any) -> None:
    for name in (*SIZES, *CHOICES, *SWITCHES):
        kind: dict[str, Any] = {"type": int} if name in SIZES else {"choices": CHOICES.get(name)}
        told = f" (default: {DEFAULTS[name]})" if name in DEFAULTS else ""
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, help=f"as in training{told}",
                           **({"action": "store_true"} if name in SWITCHES else kind))  # fmt: skip


def add_job_flags(group: Any) -> None:
    # fmt: off
    add = group.add_argument
    add("--micro-batch-size", type=int, help="default: the checkpoint's, or 1")
    add("--global-batch-size", type=int, help="default: the checkpoint's, or 4 micro-batches a GPU")
    add("--bf16", action="store_true", help="weights in bf16, Adam in fp32 (default: all in fp32)")
    add("--use-distributed-optimizer", action="store_true", help="spread Adam's states over DP")
    add("--recompute-passes", action="store_true", help="keep one hidden tensor a pass, replay the pass")
    add("--recompute-granularity", choices=("full",), help="replay layer by layer")
    add("--pipeline-window", type=int, metavar="N", help="micro-batches of a window of two phases at most")
    # fmt: on


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: vars(args)[name] for name in (*SIZES, *CHOICES, *SWITCHES) if name in vars(args)}


def of_flags(given: dict[str, Any], positions: int, instead: str) -> dict[str, Any]:
    """Megatron's arguments of a model, by the names under which a checkpoint stores them.

    Args:
        positions: where ``--max-position-embeddings`` is not given. instead: the flags that name a model.
    """
    missing = [flag_of(name) for name in NEEDED if name not in given]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; describe the model, or name one with {instead}.")
    values = {**DEFAULTS, "max_position_embeddings": positions, **given}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if (hidden % heads and "kv_channels" not in given) or heads % given.get("num_query_groups", 1):
        raise UserError("--num-attention-heads must divide --hidden-size and be divided by --num-query-groups.")
    values.setdefault("ffn_hidden_size", int(hidden * 8 / 3 / 64) * 64 if "swiglu" in given else 4 * hidden)
    return values | {"group_query_attention": "num_query_groups" in given, "padded_vocab_size": values["vocab_size"],
                     "add_bias_linear": "disable_bias_linear" not in given}  # fmt: skip


def of_checkpoint(folder: Path) -> dict[str, Any]:
    """As :func:`of_flags`, of a checkpoint; it tells the job too."""
    from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint, iteration_folder

    return TorchDistCheckpoint(iteration_folder(folder)).arguments()


def hugging_face_config(folder: Path) -> tuple[Any, Architecture]:
    """transformers' config of a folder, of which nothing but its config.json is read."""
    from megatron_recursive.hf.convert.mappings import family_of, read_config
    from megatron_recursive.hf.convert.sources import config_object, read_json

    values = read_json(folder / "config.json")
    family = family_of(values, str(folder))
    config = config_object(family, values, str(folder))
    return config, read_config(family, config, str(folder))


def of_hugging_face(folder: Path) -> dict[str, Any]:
    """As :func:`of_flags`, of a Hugging Face folder."""
    config, arch = hugging_face_config(folder)
    return {**getattr(config, "recursion", {}), **arch.to_megatron()}


def complete_job(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """What is not given of the job is the checkpoint's, or a default."""
    args.seq_length = args.seq_length or values.get("seq_length") or min(4096, values["max_position_embeddings"])
    args.micro_batch_size = args.micro_batch_size or values.get("micro_batch_size") or 1
    batch = args.global_batch_size or values.get("global_batch_size")
    args.global_batch_size = batch or 4 * args.gpus * args.micro_batch_size
    args.bf16 = bool(args.bf16 or values.get("bf16"))


def job_of(args: argparse.Namespace, arch: Architecture, plan: RecursionPlan, memory: float, **settings: Any) -> Job:
    from megatron_recursive.pipeline.layouts import Job

    # As with Transformer Engine on a GPU: fused norms and activations; no dropout.
    recording = Recording(
        args.micro_batch_size, element=2 if args.bf16 else 4, rotary=arch.positions == "rope",
        recompute_passes=args.recompute_passes, recompute_layers=int(args.recompute_granularity is not None),
    )  # fmt: skip
    return Job(
        arch.shape(args.seq_length), plan, args.gpus, memory, global_batch=args.global_batch_size, recording=recording,
        state=StateBytes() if args.bf16 else StateBytes(4, 4, 8), distributed_optimizer=args.use_distributed_optimizer,
        window=args.pipeline_window or 0, **settings,
    )  # fmt: skip
