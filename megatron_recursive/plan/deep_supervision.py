"""Deep supervision: a loss after every block, and how much each weighs, which may grow while training."""

from __future__ import annotations

from dataclasses import replace

from megatron_recursive.plan.recursion_config import RecursionConfig
from megatron_recursive.plan.recursion_plan import RecursionPlan


def block_weights(config: RecursionConfig, blocks: int, share: float = 1.0) -> list[float]:
    """Of the losses after each of N blocks: b, b (i + 1) / N or b 2^i / 2^(N-1), and 1 of the last, over their sum.

    ``share`` of the base b is taken.
    """
    schedule, base = config.deep_supervision_schedule, config.deep_supervision_weight * share
    earlier = {
        "constant": [base for _ in range(blocks - 1)],
        "linear_decay": [base * (i + 1) / blocks for i in range(blocks - 1)],
        "exponential_decay": [base * 2.0 ** (i + 1 - blocks) for i in range(blocks - 1)],
    }[schedule]
    total = sum(earlier) + 1.0
    return [weight / total for weight in (*earlier, 1.0)]


def share_of(ramp: tuple[int, int], iteration: int) -> float:
    """The part of the base weight that counts after so many iterations: 0 until START, then a line to 1 at END."""
    start, end = ramp
    return min(max((iteration - start) / (end - start), 0.0), 1.0)


def supervised(plan: RecursionPlan, config: RecursionConfig, share: float = 1.0) -> RecursionPlan:
    """The plan, at whatever depth, with the weights of the config; unchanged where that asks for no deep supervision.

    A block that weighs nothing, and whose states are cut behind it, carries no gradient: then the plan is the one
    without deep supervision, and costs no more.
    """
    if not config.enable_deep_supervision or plan.trains_heads_only:
        return plan
    weights, cut = block_weights(config, plan.num_blocks, share), {p.block - 1 for p in plan.passes if p.cuts_states}
    passes = []
    for p in plan.passes:
        weight = weights[p.block]
        grad = p.grad and (weight > 0 or p.block not in cut)
        passes.append(replace(p, grad=grad, supervised_weight=weight if plan.is_block_end(p) else 0.0))
    return replace(plan, passes=tuple(passes))
