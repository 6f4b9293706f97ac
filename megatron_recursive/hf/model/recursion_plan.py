"""The plan, as this package has it. In an export ``plan/recursion_plan.py`` itself stands in this file's place."""

from megatron_recursive.plan.recursion_plan import STATES, DecoderPass, RecursionPlan

__all__ = ["STATES", "DecoderPass", "RecursionPlan"]
