"""Numbers that no run can have, refused by flag as they are read.

Megatron asserts on many of them only where it uses them, after the model is built or in the loop, and takes NaN for a
number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from megatron_recursive.errors import UserError

# What to give | its test | Megatron's arguments that need it. Every float is finite, and every other integer 0 or more.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("a positive number", lambda x: x > 0,
     "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels seq_length "
     "max_position_embeddings rotary_base rotary_percent rotary_seq_len_interpolation_factor rope_scaling_factor "
     "layernorm_epsilon init_method_std embedding_init_method_std vocab_size padded_vocab_size "
     "make_vocab_size_divisible_by tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
     "micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size train_iters train_samples "
     "lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples log_interval eval_interval save_interval "
     "tensorboard_log_interval tensorboard_queue_size recompute_num_layers seed adam_eps loss_scale initial_loss_scale "
     "min_loss_scale loss_scale_window hysteresis distributed_timeout_minutes num_distributed_optimizer_instances "
     "num_dataset_builder_threads dist_ckpt_workers ddp_bucket_size ddp_num_buckets "
     "muon_num_ns_steps muon_extra_scale_factor"),
    ("a number from 0 to 1", lambda x: 0 <= x <= 1, "hidden_dropout attention_dropout"),
    ("a number of at least 0 and below 1", lambda x: 0 <= x < 1,
     "adam_beta1 adam_beta2 sgd_momentum muon_momentum lion_beta1 lion_beta2 lr_warmup_fraction"),
    ("a number of 0 or more", lambda x: x >= 0,
     "lr min_lr lr_warmup_init decoupled_lr decoupled_min_lr weight_decay start_weight_decay end_weight_decay "
     "clip_grad mid_level_dataset_surplus"),
)  # fmt: skip
MAY_BE_NEGATIVE = ("null_tokenizer_eod_id", "null_tokenizer_pad_id", "local_rank", "async_ckpt_cpu_priority",
                   "async_ckpt_io_priority", "delta_offload_bytes_across_pp_ranks", "profile_ranks")  # fmt: skip


def restrict_numbers(parser: argparse.ArgumentParser) -> None:
    """Let Megatron's parser take only numbers that can be."""
    rules = {name: (what, test) for what, test, names in RULES for name in names.split()}
    for action in parser._actions:
        if action.type is float or action.type is int:
            what, test = rules.get(action.dest, ("a finite number", lambda x: True))
            if action.type is int and action.dest not in rules and action.dest not in MAY_BE_NEGATIVE:
                what, test = "a number of 0 or more", lambda x: x >= 0
            action.type = _number(action.type, action.option_strings[0], what, test)


def _number(kind: Any, flag: str, what: str, test: Callable[[Any], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value: float = kind(text)
        if not math.isfinite(value) or not test(value):
            raise UserError(f"{flag} is {text}; give {what if math.isfinite(value) else 'a finite number'}.")
        return value

    read.__name__ = kind.__name__  # which argparse tells of what is no number
    return read
