"""Into which windows of micro-batches a step is cut, which groups the schedule takes, and what a stage then holds."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_recursive.plan.trips import free_trips

WINDOW_PER_STAGE = 4  # micro-batches of a window for each stage, unless --pipeline-window says how many


def microbatch_group_size(stages: int, num_microbatches: int) -> int:
    """The smallest N >= stages of which num_microbatches is a multiple, or leaves a remainder >= stages."""
    group = stages
    while 0 < num_microbatches % group < min(stages, num_microbatches):
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


def most_held(
    grad: Sequence[bool], stages: int, micro_batches: int, windows: Sequence[int], stage: int, kept: Sequence[float]
) -> float:
    """The most that a stage holds at once, of trips that each keep so much of a micro-batch there.

    Stage p runs (V - 1) N + 2 (P - 1 - p) forwards before its first backward, N micro-batches a group, and then one of
    each in turn; both take the groups one by one and in a group trip by trip. So what it holds after a forward is known
    without simulating: recorded forwards up to there less the backwards of as many slots earlier. It is most at the end
    of a trip; all groups but the first and the last are alike.
    """
    if len(kept) == 1:  # 1F1B
        return min(stages - stage, micro_batches) * kept[0]
    if windows:
        kept = kept[free_trips(grad) :]
    return max(_most(kept, stages, stage, size) for size in set(windows or (micro_batches,)))


def _most(kept: Sequence[float], stages: int, stage: int, micro_batches: int) -> float:
    group = microbatch_group_size(stages, micro_batches)
    lag = (len(kept) - 1) * group + 2 * (stages - 1 - stage) + 1

    def recorded(slots: int, order: Sequence[float]) -> float:
        before = max(slots, 0) // (len(order) * group) * group
        rest, size = slots - before * len(order), min(group, micro_batches - before)
        return before * sum(order) + sum(min(max(rest - n * size, 0), size) * each for n, each in enumerate(order))

    starts = range(0, micro_batches, group)
    ends = (
        start * len(kept) + (n + 1) * min(group, micro_batches - start)
        for start in {*starts[:2], starts[-1]} for n in range(len(kept))
    )  # fmt: skip
    return max(recorded(end, kept) - recorded(end - lag, kept[::-1]) for end in ends)


def in_flight(stages: int, micro_batches: int, windows: Sequence[int] = (), *, interleaved: bool = True) -> int:
    """Micro-batches that are under way at once: two groups."""
    size = max(windows, default=micro_batches)
    return min(size, 2 * microbatch_group_size(stages, size)) if interleaved and stages > 1 else 1
