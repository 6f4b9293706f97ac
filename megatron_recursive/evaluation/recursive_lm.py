"""lm-eval's model ``recursive``: its own Hugging Face model, with a depth, exits and Megatron checkpoints."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import operator
import os
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_recursive.command_line import nearest_flag
from megatron_recursive.data.tokenizer import is_hub_name
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.tokenizer_files import tokenizer_of
from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
from megatron_recursive.hf.model.exits_recursive_gpt import EXIT_ARGUMENTS, ExitOptions, ExitReport, Work
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

# Exports load with the package's own classes, so that no code of a folder is run.
AutoConfig.register(RecursiveGPTConfig.model_type, RecursiveGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(RecursiveGPTConfig, RecursiveGPTForCausalLM, exist_ok=True)

_OURS = [f"--{name}" for name in ("num_refinement_blocks", *EXIT_ARGUMENTS)]


def _export(checkpoint: str, folder: str, tokenizer: str | None) -> None:
    """In a process of its own: the proof takes the CPU for its device, and the evaluation what there is."""
    from megatron_recursive.backends import cpu

    cpu.install(on_purpose=True)
    from megatron_recursive.hf.convert.export import export_model

    export_model(checkpoint, folder, tokenizer, say=lambda text: print(text, file=sys.stderr))


@functools.cache
def exported(checkpoint: str, tokenizer: str | None) -> str:
    """A temporary export of a Megatron checkpoint, made once, by one process of each node."""
    folder = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        place = tempfile.mkdtemp(prefix="megatron-recursive-")
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        folder = f"{place}/export"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            apart.submit(_export, checkpoint, folder, tokenizer).result()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.utils import gather_object

        state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=52))])  # as in the harness
        folder = gather_object([folder])[state.process_index - state.local_process_index]
    assert folder is not None
    return folder


def _find(pretrained: str, tokenizer: Any) -> tuple[str, Any]:
    """The folder (or the hub's name) to load, and the tokenizer where it is not the folder's own."""
    path, source = Path(pretrained), pretrained
    if not path.exists() and not is_hub_name(pretrained):
        raise UserError(f"pretrained={pretrained} does not exist; name a Hugging Face folder or a Megatron checkpoint.")
    if path.is_dir() and not (path / "config.json").is_file():
        source, tokenizer = exported(pretrained, tokenizer), None  # the export holds it
    if path.is_dir() and tokenizer is None and tokenizer_of(Path(source)) is None:
        raise UserError(f"{pretrained} holds no tokenizer; give its folder with --model_args tokenizer=DIR.")
    return source, tokenizer


@register_model("recursive")
class RecursiveLM(HFLM):
    """``hf`` with further arguments. At a fixed depth it computes what ``hf`` does, by the same calls.

    Args:
        pretrained: an export, any causal model of transformers, or a Megatron checkpoint.
        num_refinement_blocks: run so many blocks (None: those of the plan); under an exit, at most so many.
        arguments: an exit and its thresholds, as :class:`ExitOptions` has them, and what ``hf`` takes.

    Raises:
        UserError: the model is not found, or has no such blocks or exit, or an argument is mistyped.
    """

    def __init__(
        self, pretrained: Any, tokenizer: Any = None, num_refinement_blocks: int | None = None, **arguments: Any
    ) -> None:
        self._exit = {name: arguments.pop(name) for name in EXIT_ARGUMENTS if name in arguments}
        for name in arguments:
            if (near := nearest_flag(f"--{name}", _OURS, likeness=0.85)) is not None:
                raise UserError(f"There is no model argument {name}; the nearest is {near[2:]}.")
        folder = pretrained
        if isinstance(pretrained, str):
            folder, tokenizer = _find(pretrained, tokenizer)
        super().__init__(folder, tokenizer=tokenizer, **{"backend": "causal", **arguments})
        if hasattr(self, "accelerator"):  # data-parallel; the harness does this for several GPUs of one node alone
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if isinstance(pretrained, str) and Path(pretrained).exists():
            self.pretrained = str(Path(pretrained).resolve())  # or the hub might be asked for a model of this name
        self._options = self._set_depth(pretrained, num_refinement_blocks)
        self.spent: Counter[str] = Counter()  # under an exit: by this process, and by all of them
        self.spent_by_all = self.spent

    @property
    def _is_recursive(self) -> bool:
        plan = getattr(self.model.config, "recursion_plan", None)
        return plan is not None and not plan.is_plain

    def _set_depth(self, name: Any, blocks: int | None) -> ExitOptions | None:
        asked = [*(["num_refinement_blocks"] if blocks is not None else []), *self._exit]
        if asked and not self._is_recursive:
            raise UserError(f"{asked[0]} needs a recursive model, but {name} is a plain one.")
        if self._exit and "exit" not in self._exit:
            raise UserError(f"{asked[-1]} belongs to an exit; give exit=halting or another, too.")
        try:
            if blocks is not None:
                self.model.set_num_refinement_blocks(blocks)
                self.model.generation_config.num_refinement_blocks = blocks  # its folder may name another for serving
            if blocks is not None and self._exit:
                self._exit.setdefault("max_inference_refinement_steps", blocks)
            return ExitOptions.make(self.model.config, **{"exit": None, **self._exit})
        except (ValueError, TypeError) as error:
            raise UserError(f"--model_args: {str(error).rstrip('.')}.") from error

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._options is None:
            return super()._model_call(inps, *args, **kwargs)
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            outputs = self.model(inps, use_cache=False, **self._exit)
        self._rows = iter(outputs.blocks.cpu())
        return outputs.logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """Called for each row of the last call in turn, with its length without padding."""
        if self._options is not None:
            assert inplen is not None
            report, blocks_S = ExitReport(self.model.config), next(self._rows)[:inplen]
            report.add(self._options, blocks_S[None], self._work_alone(self._options, blocks_S), decoded=False)
            self._spend(report)
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _work_alone(self, options: ExitOptions, blocks_S: Tensor) -> Work:
        """What a text would have cost by itself, so that the results do not depend on its batch."""
        config, length = self.model.config, len(blocks_S)
        active = [int((blocks_S > block).sum()) for block in range(int(blocks_S.max()))]
        layers = config.layers_per_block
        asked = sum(active[: options.max_blocks - 1])
        adapted = sum(map(operator.mul, active, config.adapted_layers(len(active))))
        scores = layers * len(active) * length**2
        return Work(layers * sum(active), scores, asked, length, (length, length**2), adapted)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        tokens = super()._model_generate(context, max_length, stop, **self._exit, **kwargs)
        report = getattr(self.model, "last_exit_report", None)  # the folder's generation config may have an exit, too
        if report is not None:
            self._spend(report)
        return tokens

    def _spend(self, report: ExitReport) -> None:
        self.spent.update({key: getattr(report, key) for key in ("tokens", "blocks", "flops", "fixed_depth_flops")})
        self.spent.update({f"tokens of {block} blocks": count for block, count in report.histogram.items()})

    def barrier(self) -> None:
        """All processes meet here after each kind of request, also those whose answers were cached."""
        super().barrier()
        parts = self.gather_object(self.spent)
        if self.world_size > 1 and self.rank == 0:
            self.spent_by_all = sum(parts, Counter())

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results: in ``recursion`` mean blocks, and the share of FLOPs saved."""
        info, spent = super().get_model_info(), self.spent_by_all
        if self._is_recursive:
            plan = self.model.config.recursion_plan
            blocks = plan.depth
            found = {"num_refinement_blocks": blocks, "mean_blocks": float(blocks), "flops_saved": 0.0}
            if spent["tokens"]:
                found |= self._exit | {key: value for key, value in sorted(spent.items()) if key.startswith("tokens")}
                found["mean_blocks"] = spent["blocks"] / spent["tokens"]
                found["flops_saved"] = 1.0 - spent["flops"] / spent["fixed_depth_flops"]
            elif self._options is not None:  # all answers come from --use_cache, which knows no depths
                found |= self._exit | {"mean_blocks": None, "flops_saved": None}
            info["recursion"] = found
        return info
