"""What the command ``generate`` does: prompts in batches, or a conversation."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from itertools import batched, groupby

from megatron_recursive.errors import UserError
from megatron_recursive.inference import output
from megatron_recursive.inference.conversation import Conversation
from megatron_recursive.inference.generation import Settings, encode_prompt, generate, room_for
from megatron_recursive.inference.loading import Loaded, open_model
from megatron_recursive.inference.prompts import read_prompts


def run(args: argparse.Namespace) -> None:
    """Answer every prompt, or hold a conversation.

    Raises:
        UserError: before anything is generated, if flags, model or a prompt cannot be.
    """
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    _check_flags(args)
    prompts = [] if args.interactive else read_prompts(args.prompt, args.prompt_file)
    with open_model(
        args.model, tokenizer=args.tokenizer, dtype=args.dtype, num_refinement_blocks=args.num_refinement_blocks,
        device=args.device, device_map=args.device_map,
    ) as loaded:  # fmt: skip
        settings.check(loaded)
        if args.show_recursive_steps and not loaded.recursive:
            raise UserError(f"--show-recursive-steps needs a recursive model, but {args.model} is a plain one.")
        if args.interactive:
            Conversation(loaded, settings, args).hold()
        else:
            _answer_all(loaded, prompts, settings, args)


def _check_flags(args: argparse.Namespace) -> None:
    if args.system is not None and not args.interactive:
        raise UserError("--system opens a conversation; give --interactive too.")
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise UserError("--interactive reads what you type; leave out --prompt, --prompt-file and --json.")
    if not args.interactive and not args.prompt and args.prompt_file is None:
        raise UserError("There is nothing to answer; give --prompt, --prompt-file or --interactive.")
    if args.device_map is not None and args.device == "cpu":
        raise UserError("--device-map spreads a model over GPUs; leave out --device cpu.")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, but is {args.batch_size}.")
    if args.batch_size > 1 and (args.interactive or args.show_recursive_steps):
        raise UserError("--interactive and --show-recursive-steps follow one sequence; leave out --batch-size.")
    if args.show_recursive_steps and args.num_beams > 1:
        raise UserError("--show-recursive-steps follows one sequence; leave out --num-beams.")


def _answer_all(
    loaded: Loaded, prompts: list[tuple[str, str]], settings: Settings, args: argparse.Namespace
) -> None:
    encoded = [encode_prompt(loaded, prompt, name) for name, prompt in prompts]
    shows_text = not args.json and not args.show_recursive_steps
    streams = shows_text and sys.stdout.isatty() and settings.num_beams == 1 and args.batch_size == 1
    for _, group in groupby(range(len(prompts)), lambda number: room_for(loaded, encoded[number], settings)):
        for batch in batched(group, args.batch_size):
            for number in batch:
                output.warn_of_cut(loaded, encoded[number], settings, prompts[number][0])
            if streams:
                print(prompts[batch[0]][1], end="", flush=True)
            on_token = output.step_printer(loaded, batch[0], args) if args.show_recursive_steps else None
            ids = [encoded[number] for number in batch]
            answers = generate(loaded, ids, settings, output.write if streams else None, on_token)
            for number, answer in zip(batch, answers, strict=True):
                prompt = prompts[number][1]
                if streams:
                    print(flush=True)
                elif shows_text or (sys.stdout.isatty() and not args.json):
                    print(f"{prompt}{answer.text}", flush=True)
                else:
                    output.print_json(output.answer_record(prompt, answer))
                if not args.json:
                    output.say(f"[{number + 1} of {len(prompts)}: {output.summary(answer)}]")
