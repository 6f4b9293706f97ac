"""bitsandbytes and torchao on a recursive model, on the CPU: what is quantised, what it says, and LoRA on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
from tests.unit_tests.hf.recursive_models import make_model, make_tokens
from tests.unit_tests.hf.test_adapters import SHARED, TARGETS, adapted
from tests.unit_tests.models.comparing import relative_error, worst_error

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit"),  # no autograd kernel: the gradients are tested below
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# Largest error against the dense model of the dequantised weights. bitsandbytes' kernel for CPUs computes in bf16, and
# packs the weights anew for that when it is first asked without gradient.
TOLERANCES = {"bitsandbytes nf4": 0.05, "torchao int8": 1e-4}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


def _settings(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _quantised(kind: str, folder: Path) -> Any:
    make_model(**SIZES).save_pretrained(folder)
    return RecursiveGPTForCausalLM.from_pretrained(folder, quantization_config=_settings(kind)).eval()


def _dense(quantised: Any) -> Any:
    """The plain model of the numbers that the quantised weights stand for."""
    import bitsandbytes

    model = make_model(**SIZES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = quantised.get_parameter(name)
            if hasattr(stored, "quant_state"):
                stored = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
            parameter.copy_(stored.dequantize() if hasattr(stored, "qdata") else stored)
    return model


@pytest.mark.parametrize("kind", TOLERANCES)
def test_layers_are_quantised_and_the_halting_head_is_not(kind: str, tmp_path: Path) -> None:
    model, tokens = _quantised(kind, tmp_path), make_tokens(2, 12)
    dense = _dense(model)
    layers = [m for n, m in model.named_modules() if n.split(".")[-1] in SHARED]
    assert len(layers) == 2 * len(SHARED)
    assert not any(m.weight.dtype == torch.float32 and type(m.weight) is nn.Parameter for m in layers)
    assert type(model.halting_head.weight) is nn.Parameter and model.halting_head.weight.dtype == torch.float32
    asked: list[Tensor] = []
    model.halting_head.register_forward_hook(lambda _, given, answer: asked.append(answer))
    with torch.no_grad():
        said = model(tokens, output_blocks=True)
        assert len(asked) == 3 and all(answer.dtype == torch.float32 for answer in asked)
        exit = {"exit": "halting", "halt_threshold": 0.5}
        assert model.generate(tokens, max_new_tokens=3, do_sample=False, **exit).shape == (2, 15)
        expected = dense(tokens, output_blocks=True)
    assert relative_error(said.block_logits, expected.block_logits) < TOLERANCES[kind]
    assert relative_error(said.block_halting, expected.block_halting) < TOLERANCES[kind]


def test_a_qlora_step_is_that_on_the_dequantised_weights(tmp_path: Path) -> None:
    import peft

    model, tokens = _quantised("bitsandbytes nf4", tmp_path), make_tokens(2, 12)
    dense = adapted(_dense(model)).train()
    prepared = adapted(peft.prepare_model_for_kbit_training(model)).train()
    prepared.load_state_dict({n: p for n, p in dense.state_dict().items() if "lora_" in n}, strict=False)
    found: list[dict[str, Tensor]] = []
    for each in (prepared, dense):
        parameters = {name: p for name, p in each.named_parameters() if p.requires_grad}
        assert len(parameters) == 2 * (2 * len(SHARED) + 1) and len(TARGETS) == len(SHARED) + 1
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        loss = each(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        optimizer.step()
        found.append({"loss": loss.detach(), "after": each(input_ids=tokens, labels=tokens).loss.detach(), **gradients})
    assert found[0].keys() == found[1].keys() and len(found[0]) == len(parameters) + 2
    error, where = worst_error(*found)
    assert error < 2e-4, where
    assert found[0]["after"] < found[0]["loss"]
