"""What vLLM's Transformers backend does to a model, step by step, as its public sources have it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.utils import logging

from megatron_recursive.hf.convert.export import AUTO_MAP
from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM, RecursiveGPTModel
from tests.unit_tests.hf.recursive_models import SHAPES, make_config, make_model, make_tokens
from tests.unit_tests.models.comparing import relative_error

AutoConfig.register("recursive_gpt", RecursiveGPTConfig, exist_ok=True)
AutoModel.register(RecursiveGPTConfig, RecursiveGPTModel, exist_ok=True)


class PagedAttention:
    """The engine's own attention of one slot: it keeps keys and values, [tokens, heads * D] each."""

    def __init__(self, config: Any) -> None:
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.keys = self.values = torch.empty(0, self.groups * self.size)
        self.scale = 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys, self.values = torch.cat([self.keys, key]), torch.cat([self.values, value])
        q, k, v = (each.unflatten(-1, (-1, self.size)).transpose(0, 1) for each in (query, self.keys, self.values))
        seen = torch.ones(len(query), len(self.keys), dtype=torch.bool).tril(len(self.keys) - len(query))
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=True)
        return result.transpose(0, 1).flatten(1)


def engine_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, attention_instances: Any, **__: Any
) -> tuple[Tensor, None]:
    mine = attention_instances[module.layer_idx]
    mine.scale, tokens = scaling, query.shape[-2]
    return mine.forward(*(each.transpose(1, 2).reshape(tokens, -1) for each in (query, key, value))), None


def weight_names(model: Any) -> list[tuple[re.Pattern[str], str | None]]:
    """How names of a checkpoint become names of the engine, where the base model is ``model``; None: left out."""
    rules: list[tuple[re.Pattern[str], str | None]] = [
        (re.compile(key), None) for key in model._keys_to_ignore_on_load_unexpected or ()
    ]
    assert model.base_model_prefix == "model"
    children = [name for name, _ in [*model.named_children(), *model.named_parameters(recurse=False),
                                     *model.named_buffers(recurse=False)]]  # fmt: skip
    any_child = "|".join(children)
    rules.append((re.compile(rf"^(?!model\.)(({any_child}).*)"), r"model.\1"))
    rules.append((re.compile(rf"^(model\.)((?!{any_child}).+)"), r"\2"))
    rules.append((re.compile(r"^model\.(.+\.)*(lm_head.+)"), r"\2"))
    return rules


class Engine(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = "engine"
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(config)
        rules = weight_names(self.model)
        plan = {f"model.{pattern}": style for pattern, style in (self.model.tp_plan or {}).items()}
        self.styles = self.replace_linears(plan)
        self.slots = {index: PagedAttention(config) for index in range(config.num_hidden_layers)}
        self.model.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.full(parameter.shape, torch.nan)))
        self.load(folder, rules, config.tie_word_embeddings)
        self.eval()

    def replace_linears(self, plan: dict[str, str]) -> dict[str, str]:
        found = {}
        for name, module in list(self.model.named_modules(prefix="model")):
            if isinstance(module, nn.Linear):
                found[name] = next((style for pattern, style in plan.items() if re.match(pattern, name)), "replicate")
                fresh = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                self.set_submodule(name, fresh)
        return found

    def load(self, folder: Path, rules: list[tuple[re.Pattern[str], str | None]], tied: bool) -> None:
        parameters, loaded = dict(self.named_parameters()), set()
        for given, tensor in load_file(folder / "model.safetensors").items():
            name: str | None = given
            for pattern, new in rules:
                if name is not None and pattern.search(name):
                    name = None if new is None else pattern.sub(new, name)
            if name is not None:
                assert name in parameters, f"There is no module or parameter named {name}"  # buffers are not loaded
                parameters[name].data.copy_(tensor)
                loaded.add(name)
        if tied:
            self.lm_head.weight = self.model.get_input_embeddings().weight
            loaded.add("lm_head.weight")
        assert set(parameters) == loaded, set(parameters) ^ loaded

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        outputs = self.model(
            input_ids=tokens[None], inputs_embeds=None, use_cache=False, position_ids=positions[None],
            attention_instances=self.slots, return_dict=False,
        )  # fmt: skip
        return self.lm_head(outputs[0][0])


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({"state_init": "trunc-normal"}, {}),
    "untied, states not normed": ({"state_norm": "none"}, SHAPES["olmo2-like"]),
    "learned positions": ({"state_init": "trunc-normal"}, SHAPES["learned positions"]),
    "a map of state and input": ({"recursion_family": "recurrent", "injection": "concat"}, {"num_layers": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_loads_and_serves_the_model(name: str, tmp_path: Path) -> None:
    recursion, shape = MODELS[name]
    model, tokens = make_model(config=make_config(recursion=recursion, **shape)), make_tokens(1, 12)
    model.save_pretrained(tmp_path)
    AttentionInterface.register("engine", engine_attention)
    with torch.no_grad():
        engine, expected = Engine(tmp_path), model(tokens).logits[0]
        chunks = [slice(0, 7), slice(7, 8), slice(8, 12)]  # a prompt, a token, a few
        said = torch.cat([engine(tokens[0, each], torch.arange(12)[each]) for each in chunks])
    assert relative_error(said, expected) < 1e-5
    assert not engine.model.training and {"colwise", "replicate"} & set(engine.styles.values())
    assert engine.model.supports_pp_plan is False, "upon which vLLM refuses to cut it into stages"


def test_the_base_model_loads_without_a_complaint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model(recursion={"state_init": "trunc-normal"}).save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        logging.disable_propagation()
    assert not report["unexpected_keys"] and not report["missing_keys"] and not caplog.messages
    assert not base.train().initial_output.requires_grad and base.initial_output.std() > 0.5
    assert AUTO_MAP["AutoModel"].endswith(RecursiveGPTModel.__name__)
    assert AUTO_MAP["AutoModelForCausalLM"].endswith(RecursiveGPTForCausalLM.__name__)
