"""What recursion adds, as the package has it. In an export ``plan/added_parameters.py`` stands in this file's place."""

from megatron_recursive.plan.added_parameters import (
    COMBINING,
    EVERY,
    MOVING,
    SEED,
    AddedParameter,
    added_parameters,
    low_rank,
    sampled_start,
    start_of,
)

__all__ = ["COMBINING", "EVERY", "MOVING", "SEED", "AddedParameter", "added_parameters", "low_rank", "sampled_start",
           "start_of"]  # fmt: skip
