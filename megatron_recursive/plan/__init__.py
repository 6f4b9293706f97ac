"""What a recursive run computes, as data: the knobs (`RecursionConfig`) and the ordered passes (`RecursionPlan`)."""

from megatron_recursive.plan.builders import build_plan
from megatron_recursive.plan.recursion_config import RecursionConfig
from megatron_recursive.plan.recursion_plan import DecoderPass, RecursionPlan
from megatron_recursive.plan.step_plans import StepPlans

__all__ = ["DecoderPass", "RecursionConfig", "RecursionPlan", "StepPlans", "build_plan"]
