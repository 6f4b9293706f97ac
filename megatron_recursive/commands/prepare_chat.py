"""``megatron-recursive prepare-chat``."""

from __future__ import annotations

import argparse
import json

from megatron_recursive.command_line import example
from megatron_recursive.commands.preprocess import add_input_and_output, add_workers
from megatron_recursive.data.chat.options import FORMATS, OVERFLOW, PATHS, TRAIN_ON, ChatOptions
from megatron_recursive.data.hub import add_hub_flags, hub_choice
from megatron_recursive.data.preprocess import ON_ERROR, Options, parse_options, preprocess
from megatron_recursive.data.tokenizer import TokenizerChoice

SUMMARY = "Write conversations as a Megatron dataset in which only the assistant's words are supervised."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write conversations by the tokenizer's chat template, tokenize them, and mark the tokens that the assistant "
        "says. PREFIX.bin and .idx hold a conversation a document, PREFIX_supervised.bin and .idx which of its tokens "
        "the loss counts, PREFIX_tokenizer the tokenizer with its template, PREFIX.idx.json the statistics. They are "
        "complete or not there; an interrupted run is gone on with by the same command. A tokenizer without a template "
        "gets a default one and seven tokens, for which convert import --resize-vocab PREFIX_tokenizer grows a model's "
        "embedding. The last line is JSON."
    )
    # fmt: off
    add = parser.add_argument_group("required").add_argument
    add_input_and_output(add, ".jsonl files (one conversation a line), .json files (the same, or one array)")
    add("--tokenizer", required=True, metavar="DIR_OR_MODEL", help="Hugging Face folder or name")
    add = parser.add_argument_group("conversations").add_argument
    add("--format", choices=FORMATS,
        help="sharegpt: conversations of from and value; alpaca: instruction, input, output, history; openassistant: "
        "messages or trees of them; messages: messages of role and content (default: each record is recognised by its "
        "keys); a system beside them opens them")
    add("--paths", choices=PATHS, default="best",
        help="of a tree of messages: the path of the best-ranked replies, or every path, each a conversation")
    add("--train-on", choices=TRAIN_ON, default="assistant",
        help="assistant: each turn of the assistant, its words and its end token; last: those of the last turn alone; "
        "all: every token, the user's and the template's too")
    add("--max-turns", type=int, metavar="N",
        help="cut longer conversations into pieces of at most N turns (messages of the user and the assistant), which "
        "begin with the user and each have the system turn")
    add("--seq-length", type=int, metavar="N", help="most tokens of a sample (default: no limit)")
    add("--overflow", choices=OVERFLOW, default="drop",
        help="a longer sample is left out (drop), keeps its last N tokens (truncate-left), or becomes several (split); "
        "the statistics count it")
    add("--show", type=int, default=0, metavar="N",
        help="print the first N samples, what is supervised in another colour (without a terminal: in [[ ]])")
    add = parser.add_argument_group("documents and files").add_argument
    add("--overwrite", action="store_true", help="replace files of PREFIX that were made otherwise")
    add_hub_flags(add)
    add("--on-error", choices=ON_ERROR, default="stop",
        help="at a malformed conversation: stop and name its line, or skip and count it, and what is damaged of a file")
    # fmt: on
    add_workers(parser)
    parser.epilog = example(
        "prepare-chat", "--input", "chats.jsonl", "--output", "data/chats", "--tokenizer", "tokenizer", "--show", "2"
    )


def run(args: argparse.Namespace) -> None:
    chat = ChatOptions(args.format, args.paths, args.train_on, args.seq_length, args.overflow, args.max_turns)
    written = preprocess(
        args.input, args.output, TokenizerChoice(args.tokenizer), workers=args.workers, executor=args.executor,
        executor_options=parse_options(args.executor_options), overwrite=args.overwrite, hub=hub_choice(args),
        options=Options(append_eod=False, on_error=args.on_error, chat=chat),
    )  # fmt: skip
    if written is None:
        print(f"submitted; the files of {args.output} appear when the last job, which joins the parts, has ended")
        return
    if args.show:
        from megatron_recursive.data.chat.show import show

        show(args.output, args.show)
    assert written.statistics is not None
    print(written.statistics.table())
    print(json.dumps({**written.statistics.to_dict(), "skipped": written.skipped}))
