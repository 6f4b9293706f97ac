"""Fails when Megatron moves under what this package patches or re-implements."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.distributed import run_distributed


def _facts() -> dict[str, Any]:
    """What the patches rely on, read from the installed Megatron."""
    import megatron.core
    from megatron.core.dist_checkpointing import validation
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_model
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
    from megatron.core.optimizer import emerging_optimizers
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.rerun_state_machine import RerunStateMachine
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.training import arguments, checkpointing, initialize, training
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_recursive.training.model_provider import RecursiveGPTModelBuilder
    from megatron_recursive.training.schedule_check import MADE_OF

    def calls(function: Any, name: str) -> bool:
        return f"{name}(" in inspect.getsource(function).split("):", 1)[1]

    return {
        "version": megatron.core.__version__,
        "global calls": {
            "training_log": calls(training.train, "training_log"),
            "evaluate_and_print_results": calls(training.train, "evaluate_and_print_results"),
            "evaluate": calls(training.evaluate_and_print_results, "evaluate"),
            "train": calls(training.pretrain, "train"),
            "train_step": calls(training.train, "train_step"),
            "loaders": calls(training.build_train_valid_test_data_iterators, "build_train_valid_test_data_loaders"),
            "loader": calls(training.build_train_valid_test_data_loaders, "build_pretraining_data_loader"),
            "second parser": calls(training.pretrain, "ft_integration.setup"),
            "get_megatron_optimizer": calls(training.setup_model_and_optimizer, "get_megatron_optimizer"),
            "scheduler": calls(training.setup_model_and_optimizer, "get_optimizer_param_scheduler")
            and "self.get_lr(" in inspect.getsource(OptimizerParamScheduler.step),
            "load_checkpoint": calls(training.setup_model_and_optimizer, "load_checkpoint"),
            "num_floating_point_operations": calls(training.training_log, "num_floating_point_operations"),
            "rotary positions": calls(rope_utils.apply_rotary_pos_emb, "_apply_rotary_pos_emb_bshd"),
            "report_theoretical_memory": calls(training.training_log, "report_theoretical_memory"),
            "save_checkpoint": calls(training.save_checkpoint_and_time, "save_checkpoint"),
            "products of linears": all("self._forward_impl(" in inspect.getsource(linear.forward)
                                       for linear in (ColumnParallelLinear, RowParallelLinear)),
            "registry": "_EMERGING_OPTIMIZERS[" in inspect.getsource(emerging_optimizers._create_emerging_optimizer),
            "compile_helpers": calls(initialize._compile_dependencies, "compile_helpers"),
        },
        "training_log": list(inspect.signature(training.training_log).parameters),
        "evaluate_and_print_results": list(inspect.signature(training.evaluate_and_print_results).parameters),
        "report_theoretical_memory": list(inspect.signature(training.report_theoretical_memory).parameters),
        "old checkpoints": inspect.getsource(training.build_train_valid_test_data_loaders).count(
            "if args.iteration > 0 and args.consumed_train_samples == 0:"
        ),
        "consumed": inspect.getsource(training.train).count("args.consumed_train_samples += iteration_sequences"),
        "trace": "f\"{args.tensorboard_dir}/../torch_profile\"" in inspect.getsource(training.train),
        "tracker": "maybe_msc.open(tracker_filename, 'w')" in inspect.getsource(checkpointing.save_checkpoint),
        "results": "if _results_queue is None:" in inspect.getsource(filesystem_async.get_write_results_queue)
        and "global_results_queue.put(" in inspect.getsource(
            filesystem_async.FileSystemWriterAsync.write_preloaded_data_multithread)
        and "self.results_queue.get_nowait()" in inspect.getsource(
            filesystem_async.FileSystemWriterAsync.retrieve_write_results),
        "split": "legacy_default_split_value = '969, 30, 1'" in inspect.getsource(arguments.validate_args),
        "schedule": list(OptimizerParamScheduler.state_dict(SimpleNamespace(**dict.fromkeys(  # type: ignore[arg-type]
            (*MADE_OF, "num_steps"))))),
        "schedule flags": list(MADE_OF),
        "manifest": validation.INTEGRITY_FNAME + " " + ",".join(
            name for name in ("save_integrity_manifest", "verify_integrity_manifest", "_verify_integrity_manifest_impl")
            if list(inspect.signature(getattr(validation, name)).parameters) == ["checkpoint_dir"]),
        "step": "assert len(steps) == 1" in inspect.getsource(DistributedOptimizer.state_dict),
        "moments": [key for key in ("if not isinstance(tensors[key], torch.Tensor):", "dst_tensors[key].copy_(")
                    if key in inspect.getsource(DistributedOptimizer._set_main_param_and_optimizer_states)],
        "averaged": [
            list(inspect.signature(getattr(DistributedOptimizer, name)).parameters)[1:]
            for name in ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states")],
        "named": isinstance(DistributedOptimizer.optimizer_state_keys, property)
        and "self.optimizer_state_keys" in inspect.getsource(DistributedOptimizer.get_parameter_state_dp_zero),
        "muon": emerging_optimizers._EMERGING_OPTIMIZERS["muon"].default_param_overrides != {},
        "passing": checkpointing._NON_PERSISTENT_CKPT_SUBDIR,
        "first line": inspect.getsource(training.training_log).count("is_first_iteration"),
        "profiler": "prof = torch.profiler.profile(" in inspect.getsource(training.train),
        "batches": StepBatchsizeNumMicroBatchesCalculator._parse_schedule("0:4 1K:8", 10),
        "raised": "raise RuntimeError(full_message)" in inspect.getsource(RerunStateMachine.validate_result),
        "flagged forward": "None if self.disable_parameter_transpose_cache else self.is_first_microbatch"
        in (Path(megatron.core.__file__).parent / "extensions" / "transformer_engine.py").read_text(encoding="utf-8"),
        "not started": "if self.is_first_batch:\n            self.start_grad_sync("
        in inspect.getsource(param_and_grad_buffer._ParamAndGradBucketGroup.finish_grad_sync),
        "upstream builder": _keywords(GPTModelBuilder.build_model, "GPTModel"),
        "our builder": _keywords(RecursiveGPTModelBuilder.build_model, "RecursiveGPTModel"),
        "preprocess returns": "preproc_output = (\n            decoder_input,\n            rotary_pos_emb,"
        in inspect.getsource(gpt_model.GPTModel._preprocess),
    }


def _keywords(function: Any, name: str) -> list[str]:
    """The keyword arguments of the first call of ``name`` inside a function."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            return [keyword.arg or "**" for keyword in node.keywords]
    return []


def test_what_is_patched_is_still_where_it_was() -> None:
    (facts,) = run_distributed(_facts, 1)
    assert facts["version"].startswith("0.19."), "the patches are written for megatron-core 0.19"
    assert all(facts["global calls"].values()), facts["global calls"]
    assert {"loss_dict", "iteration", "learning_rate", "grad_norm"} <= set(facts["training_log"])
    assert {"prefix", "iteration"} <= set(facts["evaluate_and_print_results"])
    assert facts["report_theoretical_memory"] == ["args", "num_microbatches", "verbose"]
    assert facts["preprocess returns"] and facts["trace"] and facts["raised"]
    assert facts["old checkpoints"] == 1
    assert facts["flagged forward"] and facts["not started"]
    assert facts["tracker"] and facts["results"] and facts["step"] and facts["split"]
    assert len(facts["moments"]) == 2 and facts["profiler"]
    assert facts["averaged"] == [["model_param"], ["model_param", "tensors"]] and facts["named"] and facts["muon"]
    assert facts["passing"] == "non_persistent" and facts["batches"] == [(0, 4), (100, 8)]
    assert facts["first line"] == 5  # parameter, reset, line, its comment, timers: what another value of it changes
    assert set(facts["schedule"]) == {*facts["schedule flags"], "num_steps"}
    functions = "save_integrity_manifest,verify_integrity_manifest,_verify_integrity_manifest_impl"
    assert facts["manifest"] == f"integrity.json {functions}"


def test_our_builder_passes_what_upstream_passes() -> None:
    (facts,) = run_distributed(_facts, 1)
    assert set(facts["our builder"]) - set(facts["upstream builder"]) == {"recursion", "plan"}
    # Multi-token prediction is refused, so its spec is not passed on.
    assert set(facts["upstream builder"]) - set(facts["our builder"]) == {"mtp_block_spec"}
