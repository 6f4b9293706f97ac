"""What training would make of some flags, without training: ``python -m megatron_recursive.training.describe``.

Reads name -> {"flags", "processes"} as JSON, and writes name -> what the metrics file says of such a run and a little
more, or {"error"}: the sentence that refuses the flags.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from megatron_recursive.accounting import parameters_by_stack
from megatron_recursive.backends import cpu
from megatron_recursive.errors import UserError
from megatron_recursive.plan.added_parameters import COMBINING


def describe(asked: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The answer to each. What Megatron holds globally is cleared again."""
    cpu.install()
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from megatron_recursive.data.content_keyed import data_of_run
    from megatron_recursive.training.arguments import parse_arguments
    from megatron_recursive.training.donors import donors_of_run
    from megatron_recursive.training.model_provider import model_config_from_args, model_shape
    from megatron_recursive.training.report import run_description

    facts: dict[str, dict[str, Any]] = {}
    for name, given in asked.items():
        world = str(given["processes"])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        sys.argv = ["pretrain", *given["flags"]]
        try:
            args, recursion = parse_arguments()
            more = {"iterations": args.train_iters, "evaluation iterations": args.eval_iters,
                    "layers": args.num_layers, "width": args.hidden_size,
                    # Of the data. Where samples that halt are replaced the run itself tells how many it read.
                    "tokens read per iteration":
                    args.global_batch_size * args.seq_length / recursion.num_supervision_steps}  # fmt: skip
            config = model_config_from_args(args, recursion)
            plan, shape = config.step_plans(args).served_plan(), model_shape(config, args.seq_length)
            stacks = {n: (held, run // held) for n, (held, run) in parameters_by_stack(shape, plan).items() if held}
            if plan.maps:  # what joins state and input
                size = sum(each.size(shape.hidden_size) for word in plan.maps for each in COMBINING[word])
                stacks["injection"] = size, sum(each.combine in plan.maps for each in plan.passes)
            facts[name] = run_description(args, config) | more | {"stacks": stacks, "passes": plan.num_passes}
            facts[name]["plain"] = not recursion.enable_recursive_refinement
            facts[name]["data"], facts[name]["donors"] = data_of_run(args), donors_of_run(args)
        except UserError as error:
            facts[name] = {"error": str(error)}
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return facts


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = describe(json.load(sys.stdin))
    print(json.dumps(answer))
