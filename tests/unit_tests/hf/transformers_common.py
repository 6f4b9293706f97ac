"""Transformers' own common tests on our model, for plans of every family.

Not collected by itself: tests/functional_tests/test_transformers_common.py puts the test sources of the installed
version on the path, as the package ``transformers_tests``, and runs this file.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM, RecursiveGPTModel
from tests.unit_tests.hf.recursive_models import make_config

VOCAB = 99
# By these names the mixins tell which class takes labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["recursive_gpt"] = "RecursiveGPTForCausalLM"
MODEL_MAPPING_NAMES["recursive_gpt"] = "RecursiveGPTModel"


class Model:
    """What the mixins ask of a model: its config and a batch."""

    causal_lm_class = RecursiveGPTForCausalLM
    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_attention_heads = VOCAB, 32, 4

    def __init__(self, recursion: dict[str, Any] | None) -> None:
        self.recursion = recursion
        self.num_hidden_layers = self.get_config().num_hidden_layers

    def get_config(self) -> RecursiveGPTConfig:
        config = make_config(
            blocks=2, latents=1, recursion=self.recursion or {}, vocab_size=VOCAB, initializer_range=0.02,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        if self.recursion is None:
            config.set_plan(None)
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[RecursiveGPTConfig, dict[str, Any]]:
        tokens = torch.randint(3, VOCAB, (self.batch_size, self.seq_length))
        mask = torch.ones_like(tokens)
        mask[0, -1] = 0
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


class CommonTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (RecursiveGPTModel, RecursiveGPTForCausalLM)
    pipeline_model_mapping: dict[str, Any] = {}
    training_overfit_steps = 200  # enough at this rate but for the hierarchical plan
    training_overfit_learning_rate = 3e-3
    model_tester: Any = None
    recursion: dict[str, Any] | None = {}

    def setUp(self) -> None:
        self.model_tester = Model(self.recursion)
        self.config_tester = ConfigTester(self, config_class=RecursiveGPTConfig, hidden_size=32)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip("num_hidden_layers counts layers applied, a pass and layer each")
    def test_num_layers_is_small(self) -> None: ...

    @unittest.skip("its dynamic part: frequencies that depend on the length are refused; yarn: test_modeling.py")
    def test_model_rope_scaling_frequencies(self) -> None: ...

    @unittest.skip("frequencies that depend on the length are refused")
    def test_model_rope_scaling_from_config_1_dynamic(self) -> None: ...


class PlainTest(CommonTests, unittest.TestCase):
    recursion = None


class DetachedTest(CommonTests, unittest.TestCase):
    recursion = {"detach_between_refinements": True}

    @unittest.skip("hidden states of passes without gradient hold none")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...


class FullGradientTest(CommonTests, unittest.TestCase):
    recursion = {"detach_between_refinements": False}


class HuginnTest(CommonTests, unittest.TestCase):
    recursion = {"recursion_family": "recurrent", "num_recurrences": 2, "injection": "concat", "state_init": "sampled",
                 "state_norm": "core-end"}  # fmt: skip


class GatedTest(CommonTests, unittest.TestCase):
    recursion = {"recursion_family": "looped", "num_refinement_blocks": 2, "exit_gate": True}


class HierarchicalTest(CommonTests, unittest.TestCase):
    recursion = {"recursion_family": "hierarchical"}
    training_overfit_steps = 300  # a halting bias of -5 has a way to go
