"""``megatron-recursive generate``."""

from __future__ import annotations

import argparse

from megatron_recursive.command_line import example
from megatron_recursive.commands import shared

SUMMARY = "Generate text with an exported model, any causal model of transformers, or a Megatron checkpoint."
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    model = parser.add_argument_group("model, which is required")
    shared.add_model(model, "a Hugging Face folder, a name in the hub's cache, or a Megatron checkpoint")
    shared.add_tokenizer(model)
    model.add_argument("--device-map", choices=DEVICE_MAPS,
                       help="how accelerate spreads a Hugging Face folder over devices (default: on the first)")
    model.add_argument("--dtype", choices=DTYPES, default="auto",
                       help="of the weights (default: auto, as they are stored)")
    shared.add_device(model)
    asked = parser.add_argument_group("prompts and output: one of --prompt, --prompt-file and --interactive")
    asked.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    asked.add_argument("--prompt-file", metavar="FILE", help='a prompt a line, or .jsonl with "prompt"')
    asked.add_argument("--batch-size", type=int, default=1, metavar="N",
                       help="prompts at a time, padded on the left: the same answers, unless tokens are sampled; times "
                       "and blocks are those of the batch")
    asked.add_argument("--interactive", action="store_true", help="a conversation, with the tokenizer's chat template")
    asked.add_argument("--system", metavar="TEXT", help="--interactive: what opens the conversation")
    asked.add_argument("--json", action="store_true", help="a JSON line per result, and nothing else on stdout")
    asked.add_argument("--show-recursive-steps", action="store_true",
                       help="for each new token, what every block would have said, its probability and the halting "
                       "probability: a table on a terminal, JSON lines elsewhere")
    # fmt: on
    add_settings(parser)
    parser.epilog = example("generate", "--model", "DIR_OR_CKPT", "--prompt", "Once upon", "--exit", "halting")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inference.generation.Settings``, and the depth."""
    # fmt: off
    chosen = parser.add_argument_group("choice of tokens")
    chosen.add_argument("--max-tokens", type=int, default=128, help="at most so many new ones")
    chosen.add_argument("--temperature", type=float,
                        help="0: the most likely token (default without --top-k, --top-p)")
    chosen.add_argument("--top-k", type=int, help="sample among so many tokens")
    chosen.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this probability together")
    chosen.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: avoid what was said")
    chosen.add_argument("--num-beams", type=int, default=1, help="beam search with so many beams")
    chosen.add_argument("--seed", type=int, default=0, help="of sampling, for each prompt anew")
    depth = parser.add_argument_group("depth, of recursive models")
    shared.add_depth(depth)
    depth.add_argument("--exit-stable-blocks", type=int,
                       help="--exit argmax: leave after so many agreeing blocks (default: 2)")
    depth.add_argument("--max-inference-refinement-steps", type=int, metavar="BLOCKS",
                       help="cap under --exit (default: the model's, at most the T it was trained with)")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    shared.prepare_transformers()
    from megatron_recursive.inference import command

    command.run(args)
