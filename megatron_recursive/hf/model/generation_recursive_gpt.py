"""generate() with an exit. Ships inside an export: it imports torch, transformers and its neighbours alone."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from .cache_recursive_gpt import RecursiveCache
from .exits_recursive_gpt import EXIT_ARGUMENTS, GENERATION_ENTRIES, THRESHOLDS, ExitReport, ExitRule, threshold_of
from .recursion_plan import RecursionPlan


class RecursiveGenerationMixin(GenerationMixin):
    """Beside a causal model; ``last_exit_report`` says what the last call with an exit cost."""

    last_exit_report: ExitReport | None
    _open_report: ExitReport | None

    def set_num_refinement_blocks(self, count: int) -> None:
        """Run so many blocks from now on; inner blocks are dropped or repeated."""
        plan = self.config.recursion_plan
        if plan.is_plain:
            raise ValueError("This model is a plain GPT; it has no refinement blocks.")
        if self.config.pass_adapters is not None and count != plan.depth:
            raise ValueError("This model has an adapter for each pass, and none for those of another depth.")
        self._set_plan(plan.with_blocks(count))
        self._cap_exits(count)

    def _cap_exits(self, blocks: int) -> None:
        """Let exits run so many blocks, which were asked for."""
        self.config.recursion = {**self.config.recursion, "max_inference_refinement_steps": blocks}

    def _set_plan(self, plan: RecursionPlan) -> None:
        self.config.set_plan(plan)
        self.model._read_plan()
        self.model.ensure_passes(len(self.model.passes), renew=True)

    def _report(self, rule: ExitRule, outputs: Any, logits: int) -> None:
        blocks, cache = outputs.blocks, outputs.past_key_values
        assert blocks is not None
        past = 0 if cache is None else int(cache.get_seq_length()) - blocks.shape[1]
        report = ExitReport(self.config) if self._open_report is None else self._open_report
        rule.work.logits = logits
        report.add(rule.options, blocks, rule.work, decoded=past > 0)
        self.last_exit_report = report

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers. ``exit=...`` and its arguments (or the same entries of the generation config)
        let each token leave after its own block; ``last_exit_report`` then says what that saved.
        ``num_refinement_blocks`` (or that entry) is the depth of this call."""
        depth = kwargs.pop("num_refinement_blocks", None)
        for config in (*args[1:2], kwargs.get("generation_config"), self.generation_config):
            depth = getattr(config, "num_refinement_blocks", None) if depth is None else depth
        with self._at_depth(depth):
            self._open_report, self.last_exit_report = ExitReport(copy.copy(self.config)), None  # which is read later
            try:
                return super().generate(*args, **kwargs)
            finally:
                self._open_report = None

    @contextlib.contextmanager
    def _at_depth(self, count: int | None) -> Iterator[None]:
        plan, knobs = self.config.recursion_plan, self.config.recursion
        if count is None:
            yield
            return
        if count != plan.depth:
            self.set_num_refinement_blocks(count)
        self._cap_exits(count)
        try:
            yield
        finally:
            self.config.recursion = knobs
            if count != plan.depth:
                self._set_plan(plan)

    def adjust_generation_fn(
        self, generation_config: Any, from_auto_class: bool, from_pipeline: Any, name: Any, **kwargs: Any
    ) -> None:
        """Read the folder's generation config, exits included: of a file that was once made from a model's config, as
        those of donors are, transformers drops entries that it does not know. Token ids that it lacks are the config's:
        without an end, generation never stops."""
        super().adjust_generation_fn(generation_config, from_auto_class, from_pipeline, name, **kwargs)
        if generation_config is None and name is not None:
            names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
            where = {key: kwargs[key] for key in names if key in kwargs}
            file = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where)
            if file is not None:
                with open(file, encoding="utf-8") as stream:
                    entries = json.load(stream)
                ours = {key: entries[key] for key in GENERATION_ENTRIES if key in entries}
                self.generation_config.update(allow_custom_entries=True, **ours)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(self.generation_config, key) is None:
                    setattr(self.generation_config, key, getattr(self.config, key))
        self.generation_config._from_model_config = None  # else the next to read what is saved would drop them again

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str | None, dict[str, Any]]:
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if name == "input_ids" and inputs.numel():
            low, high = (int(each) for each in inputs.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"The prompt holds the token id {low if low < 0 else high}, but the model has a vocabulary of "
                    f"{self.config.vocab_size}; use the tokenizer that it was trained with."
                )
        return inputs, name, model_kwargs

    def _get_candidate_generator(self, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Exit and depth are this model's: an assistant, which may be of any class, follows its own config."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit stops within a plan of passes; give an assistant_model, or an exit.")
        generation_config = copy.copy(generation_config)
        for name in GENERATION_ENTRIES:
            vars(generation_config).pop(name, None)
        others = {name: value for name, value in model_kwargs.items() if name not in EXIT_ARGUMENTS}
        return super()._get_candidate_generator(generation_config=generation_config, model_kwargs=others, **kwargs)

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        configs = generation_config, self.generation_config
        given = {name: kwargs[name] for name in EXIT_ARGUMENTS[1:] if kwargs.get(name) is not None}
        named = [each.exit for each in configs if getattr(each, "exit", None) is not None]
        chosen = kwargs["exit"] if "exit" in kwargs else next(iter(named), None)
        for each in configs:  # its cap, and the threshold that the exit reads, unless it is there for another exit
            other = getattr(each, "exit", None) not in (None, chosen)
            for name in EXIT_ARGUMENTS[1:]:
                idle = name in THRESHOLDS and (other or name != threshold_of(chosen or ""))
                if not idle and getattr(each, name, None) is not None:
                    given.setdefault(name, getattr(each, name))
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if chosen not in (None, "none"):
            model_kwargs.update(exit=chosen, **given)
            generation_config.disable_compile = True  # what is computed depends on the data
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        fresh = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
        whole = len(set(getattr(self, "hf_device_map", {}).values())) < 2  # a RecursiveCache lies on one device
        if model_kwargs.get("exit") is not None and fresh and whole and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = RecursiveCache(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
