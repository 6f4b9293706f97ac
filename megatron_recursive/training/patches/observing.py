"""Patch of megatron-core 0.19: what observes a run is called while it trains.

``train``, ``training_log``, ``evaluate`` and ``evaluate_and_print_results`` are globals of
``megatron.training.training``, which see the model, and metrics that are already averaged over micro-batches and
ranks; Megatron has no hook there. The observers are plain: ``metrics_log``, ``progress``, ``samples``,
``start_check``, ``keep_best``. The wrappers pass everything through unchanged, but for five things. Where the depth of
steps changes, Megatron's own lines and events are without figures of blocks, which not every step has. Under
``--evaluate-ema`` an evaluation is of the averaged weights. Under ``--full-validation`` the test set is one set. An
evaluation at the end of a run of what was evaluated at its last iteration just before is left out. And the line of a
process's first iteration ends its interval where it falls on one, as Megatron's pull request 7092 has it later: in
0.19 the second line was the mean of two iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from megatron_recursive.optimizers.weight_average import WeightAverage, in_place
from megatron_recursive.training import samples
from megatron_recursive.training.keep_best import BestCheckpoint
from megatron_recursive.training.metrics_log import MetricsLog
from megatron_recursive.training.patches import wrap
from megatron_recursive.training.start_check import tell_start


def install(args: argparse.Namespace, log: MetricsLog, averages: Sequence[WeightAverage] = ()) -> None:
    """Let ``log`` and its progress see the run, and print samples where they are asked for.

    ``averages``: of weights, which are evaluated in the place of the weights.
    """
    from megatron.training import get_args, get_tokenizer, training

    prompts = samples.encode_prompts(args, get_tokenizer()) if args.generate_interval else []
    trained: dict[str, Any] = {}  # model and optimizer
    evaluated: list[dict[str, Any]] = []
    last_valid, best, test_iters = -1, BestCheckpoint(), args.eval_iters

    def train(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        run = get_args()
        log.start(run)
        tell_start(run, given["model"], given["optimizer"])
        log.progress.begin(run)
        trained.update(given)
        return call()

    def training_log(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        run, iteration = get_args(), given["iteration"]
        if iteration % run.log_interval == 0:  # the first line is an interval's: without its end the next is their mean
            given["is_first_iteration"] = False
        known = given["loss_dict"]
        if log.plans.changes:  # Megatron divides by all iterations
            given["loss_dict"] = {name: value for name, value in known.items() if " block " not in name}
        result = call()
        log.trained(run, given | {"loss_dict": known})
        if prompts and iteration % run.generate_interval == 0:
            with log.progress.pausing():
                samples.print_samples(run, trained["model"], trained["optimizer"], iteration, prompts)
        return result

    def evaluate(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        run = get_args()
        asked = run.eval_global_batch_size
        if run.full_validation and run.multiple_validation_sets:  # whose iterations are batches of one sample a rank
            run.eval_global_batch_size = run.eval_micro_batch_size * run.data_parallel_size
        result = call()
        run.eval_global_batch_size = asked
        evaluated.append(result[0] or {})
        return result

    def evaluate_and_print_results(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        nonlocal last_valid
        run, iteration = get_args(), given["iteration"]
        kind = "test" if "test set" in given["prefix"] else "valid"
        if run.skip_train:
            log.start(run)
        if kind == "valid":
            if iteration == last_valid:
                return None
            last_valid = iteration
        evaluated.clear()
        sets = run.multiple_validation_sets, run.eval_iters
        if run.full_validation and kind == "test":  # which Megatron takes for as many sets
            run.multiple_validation_sets, run.eval_iters = False, [test_iters]
        with log.progress.pausing(), in_place(averages, given["model"]):
            result = call()
        run.multiple_validation_sets, run.eval_iters = sets
        log.evaluated(run, kind, iteration, evaluated)
        if kind == "valid" and args.keep_best:
            with log.progress.pausing():
                best.evaluated(run, iteration, evaluated, trained)
        return result

    for around in (train, training_log, evaluate, evaluate_and_print_results):
        wrap(training, around.__name__, around)
