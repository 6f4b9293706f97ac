"""A model that lies on several devices, or on a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
from tests.grids import grid
from tests.unit_tests.hf.recursive_models import VOCAB, make_config, make_model, make_tokens

UNTIED = {"tie_word_embeddings": False}
# Where the parts lie: accelerate's "auto" gives such maps; tied heads lie with their embedding.
MAPS: dict[str, tuple[dict[str, int], dict[str, Any], dict[str, Any]]] = {
    "norm behind the layers": ({"model.norm": 1, "lm_head": 0, "halting_head": 1}, {}, {}),
    "heads behind the layers": ({"model.norm": 1, "lm_head": 1, "halting_head": 1}, {}, UNTIED),
    "heads apart": ({"model.norm": 1, "lm_head": 1, "halting_head": 0}, {"state_norm": "none"}, UNTIED),
    "head first": ({"model.norm": 0, "lm_head": 0, "halting_head": 1}, {"state_norm": "none"}, {}),
}


def spread(model: Any, places: dict[str, int]) -> None:
    """What ``accelerate.dispatch_model`` does. It tells tied weights by their addresses, which fake tensors lack, so
    that its hooks are set one by one."""
    for name, number in places.items():
        for module in model.get_submodule(name).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    moved = torch.empty_like(parameter, device=f"cuda:{number}")
                    module._parameters[key] = torch.nn.Parameter(moved)
            for key, buffer in module._buffers.items():
                module._buffers[key] = torch.empty_like(buffer, device=f"cuda:{number}")
        hook = AlignDevicesHook(number, place_submodules=True, skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(model.get_submodule(name), hook)
    model.tie_weights()
    add_hook_to_module(model, AlignDevicesHook(0, io_same_device=True, skip_keys=model._skip_keys_device_placement))


@pytest.mark.parametrize("name", grid(MAPS, quick=["norm behind the layers", "head first"]))
def test_layers_spread_over_two_devices(name: str) -> None:
    """Mismatched devices raise under FakeTensorMode, as they do on GPUs."""
    places, recursion, shape = MAPS[name]
    config = make_config(recursion={"state_init": "trunc-normal", **recursion}, **shape)
    with FakeTensorMode():
        with no_init_weights():  # which looks at values
            model = RecursiveGPTForCausalLM(config)
        for vector in ("initial_output", "initial_latent"):
            setattr(model.model, vector, torch.nn.Parameter(torch.empty(32, device="cuda:0"), requires_grad=False))
        spread(model, {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.rotary_emb": 0,
                       **places})  # fmt: skip
        tokens = torch.zeros(2, 8, dtype=torch.long, device="cuda:0")
        output = model.train()(tokens, labels=tokens)
        assert output.loss.device == output.logits.device == torch.device("cuda:0")
        model.eval()
        with torch.no_grad():
            output = model(tokens, output_blocks=True)
            assert output.logits.shape == (2, 8, VOCAB) and output.block_halting.shape == (3, 2, 8)
            model(tokens[:, :1], past_key_values=output.past_key_values)
            one_block = {"exit": "halting", "max_inference_refinement_steps": 1}  # nothing that depends on values
            model(tokens, use_cache=False, **one_block)


@pytest.mark.parametrize("where", ["disk", "cpu_offload"])
def test_offloaded_weights_change_nothing(where: str, tmp_path: Path) -> None:
    model = make_model(recursion={"state_init": "trunc-normal"})
    tokens, settings = make_tokens(2, 6), {"max_new_tokens": 4, "do_sample": False, "exit": "halting"}
    with torch.no_grad():
        expected, generated = model(tokens).logits, model.generate(tokens, **settings)
    if where == "disk":
        model.save_pretrained(tmp_path / "saved")
        places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.initial_output": "cpu",
                  "model.initial_latent": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu",
                  "model.layers.0": "cpu", "model.layers.1": "disk", "halting_head": "disk"}  # fmt: skip
        offloaded = RecursiveGPTForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
        )
    else:
        offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(offloaded(tokens).logits, expected)
    assert torch.equal(offloaded.generate(tokens, **settings), generated)
