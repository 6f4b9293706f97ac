"""Gradients of a weight that is used many times: sums of bf16 gradients, and kernels that add to main_grad."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.models.uses import Uses
from tests.distributed import run_distributed
from tests.models import Case, Layout, build_wrapped, train
from tests.unit_tests.pipeline.cases import ADAM, FULL
from tests.unit_tests.pipeline.test_ring import error_over_stages

# --- sums of bf16 gradients -----------------------------------------------------------------------------------------


def main_gradient(inputs: list[Tensor], *, apart: bool) -> Tensor:
    """What reaches ``main_grad``, as DDP adds to it, of a bf16 weight that multiplies each of the inputs."""
    weight, uses = torch.nn.Parameter(torch.ones_like(inputs[0])), Uses()
    main_grad = torch.zeros(weight.shape)

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(add)
    products = [uses.apart("weight", lambda x: x * weight, x) if apart else x * weight for x in inputs]
    assert uses.open["weight"] == (len(inputs) if apart else 0)
    sum(product.float().sum() for product in products).backward()
    assert not uses.open["weight"]
    return main_grad


def test_small_gradients_reach_a_large_one() -> None:
    inputs = [*[torch.full((1,), 2.0**-9, dtype=torch.bfloat16)] * 20, torch.ones(1, dtype=torch.bfloat16)]
    assert main_gradient(inputs, apart=False) == 1.0, "autograd's own sum: what this is about"
    assert main_gradient(inputs, apart=True) == 1.0 + 20 * 2.0**-9


def test_the_error_of_a_sum_does_not_grow_with_the_number_of_uses() -> None:
    """Against sums in fp64: the rounding of each gradient is the layer's, that of their sum would be ours."""
    generator = torch.Generator().manual_seed(1)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for uses in (2, 8, 64):
        inputs = [torch.rand(1000, generator=generator).bfloat16() for _ in range(uses)]
        exact = torch.stack(inputs).double().sum(0)
        for apart, found in errors.items():
            found.append(float((main_gradient(inputs, apart=apart) / exact - 1).abs().max()))
    assert max(errors[True]) < 1e-6
    assert errors[False][-1] > 1e-2 > 2 * errors[False][0]


# --- a linear that adds to main_grad itself -------------------------------------------------------------------------


class _EngineLinear(torch.autograd.Function):
    """``_linear_backward_impl`` of transformer_engine 2.20.2, pytorch/module/linear.py, with fused accumulation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.is_first_microbatch = weight, is_first_microbatch
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        accumulate = ctx.is_first_microbatch is None or not ctx.is_first_microbatch
        wgrad = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        weight.main_grad.copy_(weight.main_grad + wgrad if accumulate else wgrad)
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan), None  # the dummy that DDP must not add


def engine_like(spec: Any) -> None:
    """Puts a linear that follows Transformer Engine's contract behind attention, wrapped as in Megatron's extension."""
    from megatron.core.tensor_parallel import RowParallelLinear

    class EngineLikeLinear(RowParallelLinear):
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
            self.is_first_microbatch = True
            self.disable_parameter_transpose_cache = config.disable_parameter_transpose_cache

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if not self.fuse_wgrad_accumulation:
                return super().forward(x)
            first = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
            self.is_first_microbatch = False
            return _EngineLinear.apply(x, self.weight, first), self.bias

    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.linear_proj = EngineLikeLinear


FUSED = {"gradient_accumulation_fusion": True}
# Megatron flags a forward when a model is built, and under FP8 one of every step; kitchen is another way to FP8.
FLAGGED_EVERY_STEP = {**FUSED, "use_kitchen": True}
ENGINE = {name: Case(FULL, transformer=flags, layers=engine_like, optimizer=ADAM, steps=2)
          for name, flags in (("once", FUSED), ("every step", FLAGGED_EVERY_STEP))}  # fmt: skip


def gradients_on(stages: int) -> dict[str, Any]:
    cases = {**ENGINE, "unfused": Case(FULL, optimizer=ADAM, steps=2)}
    return {name: train(case, Layout(pp=stages)).gradients for name, case in cases.items()}


def test_no_use_of_a_fused_weight_is_overwritten() -> None:
    one, two = (run_distributed(gradients_on, stages, stages) for stages in (1, 2))
    for name, ranks in itertools.product(ENGINE, (one, two)):
        for step, expected in enumerate(one[0]["unfused"]):
            assert error_over_stages([rank[name][step] for rank in ranks], expected)[0] <= 1e-5, (name, step)


def who_fuses(case: Case) -> tuple[list[str], bool]:
    """The linears that add to main_grad themselves, and what the config says after the model is built."""
    wrapped = build_wrapped(case, Layout())
    flags = ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")
    fused = [name for name, m in wrapped.module.named_modules() if any(getattr(m, flag, False) for flag in flags)]
    return fused, wrapped.config.gradient_accumulation_fusion


def test_without_apex_the_linears_of_transformer_engine_fuse_and_no_others() -> None:
    """``output_layer`` is Megatron-Core's own beside Transformer Engine's layers too, and could not be built."""
    ((fused, config_says),) = run_distributed(who_fuses, 1, ENGINE["once"])
    assert fused == [f"decoder.layers.{layer}.self_attention.linear_proj" for layer in range(2)]
    assert config_says
    ((fused, config_says),) = run_distributed(who_fuses, 1, Case(layers=engine_like))
    assert not fused and not config_says
