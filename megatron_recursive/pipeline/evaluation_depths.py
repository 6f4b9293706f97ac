"""A forward-only step at several depths: --eval-depths.

Megatron's ``evaluate`` takes --eval-iters steps from its iterator and sums what they report. So each step is run again
at the other depths on the micro-batches that it has just read, and reports more: Megatron averages and logs that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_recursive.plan import RecursionPlan

Reports = list[dict[str, Tensor]]


def metric_of(depth: int) -> str:
    """The name of the loss at a depth."""
    return f"lm loss depth {depth}"


def evaluate_at_depths(
    run: Callable[..., Reports], plan: RecursionPlan, depths: Sequence[int], data_iterator: Any, **kwargs: Any
) -> Reports:
    """The reports of ``run`` by micro-batch (on the last stage), each with its loss at these depths.

    Each other depth costs a forward. Where depths are numbers of blocks the deepest one's has all: a block is read in
    evaluation, whatever follows it.

    Args:
        run: a schedule, which takes ``data_iterator``, ``plan`` and ``kwargs``.
        plan: what the evaluation is of.
    """
    iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    kept = None if iterator is None else _Kept(iterator)
    reports = run(data_iterator=kept, plan=plan, **kwargs)
    further = [depth for depth in depths if depth != plan.depth]
    if not plan.has_inner_depth:
        further = [max(further)] if further and max(further) > plan.depth else []
    for depth in (plan.depth, *further):
        others = reports
        if depth != plan.depth:
            again = None if kept is None else iter(kept.batches)
            others = run(data_iterator=again, plan=plan.with_blocks(depth), **kwargs)
        for report, other in zip(reports, others, strict=True):
            read = {depth: other["lm loss"]}
            if not plan.has_inner_depth:
                read |= {block: other[f"lm loss block {block}"] for block in range(1, depth)}
            report.update({metric_of(each): loss for each, loss in read.items() if each in depths})
    return reports


class _Kept:
    """An iterator that keeps what it gives."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.batches = iterator, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.batches.append(next(self.iterator))
        return self.batches[-1]
