"""Into which windows of micro-batches a step is cut, and which groups of micro-batches the schedule takes."""

from __future__ import annotations

WINDOW_PER_STAGE = 4  # micro-batches of a window for each stage, unless --pipeline-window says how many


def microbatch_group_size(stages: int, num_microbatches: int) -> int:
    """The smallest N >= stages of which num_microbatches is a multiple, or leaves a remainder >= stages."""
    group = stages
    while 0 < num_microbatches % group < stages:
        group += 1
    return group


def window_sizes(stages: int, num_microbatches: int, window: int = 0) -> tuple[int, ...]:
    """As few windows of at most ``window`` micro-batches as can be, nearly equal, all but the last multiples of stages.

    A window has at least ``stages`` micro-batches, so that the last one may have up to ``2 * stages - 1``.
    """
    groups, rest = divmod(num_microbatches, stages)
    most = max((window or WINDOW_PER_STAGE * stages) // stages, 1)
    count = min(-(-num_microbatches // (most * stages)), groups)
    sizes = [(groups // count + (number < groups % count)) * stages for number in range(count)]
    return (*sizes[:-1], sizes[-1] + rest)
