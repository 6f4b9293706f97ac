"""Opening what the user names: an export of ours, any causal model of transformers, or a Megatron checkpoint."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_recursive.backends import cpu
from megatron_recursive.backends.device import of_this_process
from megatron_recursive.command_line import command
from megatron_recursive.data.preparation import vocabulary_digest
from megatron_recursive.data.tokenizer import gpt2_tokenizer, is_hub_name, load_tokenizer
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.files import check_generation_settings
from megatron_recursive.hf.convert.sources import cached_folder, is_published
from megatron_recursive.hf.convert.tokenizer_files import token_ids
from megatron_recursive.hf.convert.torch_dist import TRACKER
from megatron_recursive.inference.text import NumberText, Text, TokenizerText

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER = "tokenizer"  # the folder that the converter puts into a checkpoint
NEEDS_ITS_OWN = "give the folder of the tokenizer that the model was trained with, with --tokenizer"


@dataclass
class Loaded:
    """A model that can generate.

    Attributes:
        max_positions: tokens of prompt and answer together that it is made for; None where it does not say.
        recursive: whether it has refinement blocks.
        trained: the arguments that a checkpoint was trained with; empty of a folder.
    """

    name: str
    model: Any
    text: Text
    max_positions: int | None
    recursive: bool
    trained: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def open_model(
    given: str, *, tokenizer: str | None = None, dtype: str = "auto", num_refinement_blocks: int | None = None,
    numbers: bool = False, device: str | None = None, device_map: str | None = None,
) -> Iterator[Loaded]:  # fmt: skip
    """Load a model and its tokenizer; a Megatron checkpoint keeps its process groups while the context lasts.

    Args:
        numbers: a folder's texts are token ids, as those of a checkpoint without a tokenizer are in any case.
        device: ``auto``, ``cuda`` or ``cpu``; None asks the environment.
        device_map: how accelerate spreads a folder's model over devices; None leaves it on one.

    Raises:
        UserError: there is no such model, it cannot be read, it has no blocks to change, or the GPU does not work.
    """
    path, device = Path(given), of_this_process(device)
    with contextlib.ExitStack() as stack:
        if path.is_dir() and not (path / "config.json").is_file():
            if not any((path / name).is_file() for name in (".metadata", TRACKER)):
                raise UserError(
                    f"--model {given} is neither a Hugging Face folder (config.json) nor a Megatron checkpoint "
                    f"({TRACKER} or .metadata); name one of these."
                )
            if device_map is not None:
                raise UserError(f"--device-map spreads Hugging Face folders, but {given} is a Megatron checkpoint; "
                                "leave it out, or export the checkpoint.")  # fmt: skip
            loaded = _open_checkpoint(stack, given, tokenizer, DTYPES.get(dtype), device)
        else:
            loaded = _open_folder(given, tokenizer, DTYPES.get(dtype, "auto"), numbers, device, device_map)
        if num_refinement_blocks is not None:
            set_blocks(loaded, num_refinement_blocks)
        yield loaded


def set_blocks(loaded: Loaded, count: int, asked_by: str = "--num-refinement-blocks") -> None:
    """Have the model run so many blocks."""
    if count < 1:
        raise UserError(f"{asked_by} must be at least 1, but is {count}.")
    if not loaded.recursive:
        raise UserError(f"{asked_by} needs a recursive model, but {loaded.name} is a plain one.")
    try:
        loaded.model.set_num_refinement_blocks(count)
    except ValueError as error:
        raise UserError(f"{asked_by} {count}: {error}") from error


# --- Hugging Face folders -------------------------------------------------------------------------------------------


def _open_folder(
    given: str, tokenizer: str | None, dtype: Any, numbers: bool, device: str, device_map: str | None
) -> Loaded:
    path = Path(given)
    if path.suffix == ".gguf" and path.is_file():
        line = command("convert", "import", "--hf", given, "--out", "CKPT")
        raise UserError(f"--model {given} is a GGUF file, which is imported first ({line}); then give --model CKPT.")
    if path.is_file():
        raise UserError(f"--model {given} is a file; name a Hugging Face folder or a Megatron checkpoint.")
    if not path.is_dir():
        if not is_hub_name(given):
            raise UserError(f"--model {given} does not exist; name a Hugging Face folder or a Megatron checkpoint.")
        path = cached_folder(given)
    check_generation_settings(path)
    try:
        from transformers import AutoConfig

        from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig

        AutoConfig.register(RecursiveGPTConfig.model_type, RecursiveGPTConfig, exist_ok=True)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model = _model_class(config).from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, device_map=device_map
        )
    # transformers and safetensors raise OSError, ValueError, KeyError, RuntimeError and their own for broken folders.
    except Exception as error:
        if is_published(path):
            line = command("convert", "import", "--hf", given, "--out", "CKPT")
            raise UserError(f"--model {given} has a class that is no part of transformers; import it first ({line}), "
                            "then give --model CKPT.") from error  # fmt: skip
        raise UserError(f"--model {given} cannot be loaded ({_reason(error)}); check the folder.") from error
    if device_map is None:
        model.to(device)
    own = path if tokenizer is None else tokenizer
    text = NumberText(config.vocab_size) if numbers else TokenizerText(load_tokenizer(own, NEEDS_ITS_OWN))
    plan = getattr(config, "recursion_plan", None)
    recursive = plan is not None and not plan.is_plain
    return Loaded(given, model.eval(), text, getattr(config, "max_position_embeddings", None), recursive)


def _model_class(config: Any) -> Any:
    """Ours without running code of the folder, or transformers' own."""
    if config.model_type == "recursive_gpt":
        from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

        return RecursiveGPTForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


# --- Megatron checkpoints -------------------------------------------------------------------------------------------


def _open_checkpoint(
    stack: contextlib.ExitStack, given: str, tokenizer: str | None, dtype: torch.dtype | None, device: str
) -> Loaded:
    if device == "cpu":
        cpu.install(on_purpose=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Megatron says about optional packages at import
        from megatron_recursive.inference.megatron_model import open_megatron
    model, found = stack.enter_context(open_megatron(given, dtype))
    root = found.checkpoint.folder.parent
    text = _checkpoint_text(given, root, found.args, tokenizer)
    beside = [Path(given) / TOKENIZER, root / TOKENIZER, Path(found.args.get("tokenizer_model") or TOKENIZER)]
    for folder in beside if tokenizer is None else [Path(tokenizer)]:
        check_generation_settings(folder)
        if (ends := token_ids(folder, {})["eos_token_id"]) is not None:
            model.generation_config.eos_token_id = ends
            break
    return Loaded(given, model, text, found.arch.max_positions, not found.plan.is_plain, found.args)


def _checkpoint_text(given: str, root: Path, args: Mapping[str, Any], tokenizer: str | None) -> Text:
    """--tokenizer, the tokenizer beside the weights, or the one that the run was started with."""
    kind, model = args.get("tokenizer_type"), args.get("tokenizer_model")
    for folder in (Path(given) / TOKENIZER, root / TOKENIZER):
        if tokenizer is None and folder.is_dir():
            tokenizer = str(folder)
    if tokenizer is not None:
        return _tokenizer_text(given, args, tokenizer)
    if kind == "NullTokenizer":
        return NumberText(args["vocab_size"])
    if kind == "HuggingFaceTokenizer" and model is not None:
        return _tokenizer_text(given, args, model)
    if kind == "GPT2BPETokenizer" and args.get("vocab_file") and args.get("merge_file"):
        return TokenizerText(gpt2_tokenizer(args["vocab_file"], args["merge_file"]))
    raise UserError(f"The checkpoint {given} was trained with {kind}, which is not read here; give --tokenizer DIR.")


def _tokenizer_text(given: str, args: Mapping[str, Any], folder: str) -> Text:
    """A folder's tokenizer; one that is not the checkpoint's is told."""
    tokenizer = load_tokenizer(folder, NEEDS_ITS_OWN)
    below, _, digest = str(args.get("tokenizer_identity") or "").partition(":")
    if digest and vocabulary_digest(tokenizer.get_vocab(), int(below)) != digest:
        print(f"WARNING: {given} was trained with another tokenizer than {folder}; {NEEDS_ITS_OWN}.", file=sys.stderr)
    return TokenizerText(tokenizer)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
