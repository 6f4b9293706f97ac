"""``megatron-recursive convert``: import, export, unroll and verify."""

from __future__ import annotations

import argparse
import json
import re

from megatron_recursive.command_line import example
from megatron_recursive.hf.convert.stacks import PRESETS, STACKS, StackChoice
from megatron_recursive.plan.knobs import FunctionKnobs, HeadKnobs, knobs_in
from megatron_recursive.plan.lora import MODES
from megatron_recursive.plan.recursion_config import add_recursion_arguments

SUMMARY = "Convert between Hugging Face models and Megatron checkpoints, with a proof at every run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, prog=parser.prog, title="actions, each with a --help of its own",
        metavar="{import,export,unroll,verify}",
    )  # fmt: skip
    _add_import(actions.add_parser("import", help="a Hugging Face model to a Megatron checkpoint"))
    _add_export(actions.add_parser("export", help="a Megatron checkpoint to a Hugging Face folder"))
    _add_unroll(actions.add_parser("unroll", help="a looped or recurrent model to a plain one of more layers"))
    verifier = actions.add_parser("verify", help="compare two folders or checkpoints; exit code 1 if they differ")
    _describe(verifier, "Compare two models tensor by tensor, and their logits.", "verify", "MODEL", "CKPT")
    required = verifier.add_argument_group("required: a Hugging Face folder or a Megatron checkpoint each")
    required.add_argument("a", metavar="A")
    required.add_argument("b", metavar="B")
    _add_proof(verifier)
    parser.epilog = example("convert", "import", "--hf", "MODEL", "--out", "CKPT")


def _describe(parser: argparse.ArgumentParser, text: str, *words: str) -> None:
    parser.description = text
    parser.epilog = example("convert", *words)


def _add_import(parser: argparse.ArgumentParser) -> None:
    _describe(parser, "Convert a Hugging Face model to a Megatron checkpoint, and print the line that trains on.",
              "import", "--hf", "MODEL", "--out", "CKPT", "--num-recurrences", "8")  # fmt: skip
    required = parser.add_argument_group("required")
    required.add_argument("--hf", required=True, metavar="MODEL", help="a folder, a .gguf file, or a cached hub name")
    required.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to make")
    shape = parser.add_argument_group("layers and embedding")
    shape.add_argument("--layer-selection", choices=("uniform", "first", "last", "middle"),
                       help="which layers --num-layers keeps (default: uniform)")  # fmt: skip
    shape.add_argument("--num-layers", type=int, metavar="K", help="how many layers to keep (default: all)")
    shape.add_argument("--layers", metavar="I-J,K,...", help="the layers to keep, by number from 0")
    shape.add_argument("--untie-embeddings", action="store_true", help="give the head a copy of the embedding")
    shape.add_argument("--resize-vocab", nargs="?", const=True, default=False, metavar="TOKENIZER",
                       help="grow the embedding to all ids of the model's tokenizer, or of the folder of a grown one "
                       "(prepare-chat's), which takes its place; new rows are the mean of the others")  # fmt: skip
    stacks = parser.add_argument_group("stacks of a recurrent model; layers in none are left out")
    stacks.add_argument("--prelude", metavar="I-J,K,...", help="the layers that run once before the core")
    stacks.add_argument("--core", metavar="I-J,K,...", help="the layers that run r times, by number from 0")
    stacks.add_argument("--coda", metavar="I-J,K,...", help="the layers that run once behind the core")
    stacks.add_argument("--from-analysis", metavar="FILE",
                        help='the same from a JSON with the lists "prelude", "core" and "coda"')  # fmt: skip
    stacks.add_argument("--preset", choices=PRESETS, help="the same as published for this donor")
    # What is not given is the source's own, where it is a model of ours.
    add_recursion_arguments(parser, (FunctionKnobs, HeadKnobs), only_given=True)
    _add_proof(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _describe(parser, "Convert a Megatron checkpoint to a folder for AutoModelForCausalLM.from_pretrained(DIR, "
              "trust_remote_code=True).", "export", "--ckpt", "CKPT", "--out", "DIR")  # fmt: skip
    required = parser.add_argument_group("required")
    required.add_argument("--ckpt", required=True, metavar="CKPT", help="a --save folder, or one iteration's folder")
    required.add_argument("--out", required=True, metavar="DIR", help="model folder to make")
    files = _add_files(parser)
    files.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="of the weights (default: as they are stored); halting head and exit gate keep their own")
    files.add_argument("--ema", action="store_true", help="the averaged weights, of a run with --ema-decay")
    files.add_argument("--as-published", action="store_true",
                       help="in names and config of the model that it was imported from (ouro, nanbeige, huginn_raven)")
    files.add_argument("--lora", choices=MODES,
                       help="of a run with --lora-rank: adapters merged into the weights (default), alone as a PEFT "
                       "folder, or left out; those of each pass stay inside a model of our own class")  # fmt: skip
    _add_proof(parser)


def _add_unroll(parser: argparse.ArgumentParser) -> None:
    _describe(parser, "Write the passes of a looped or recurrent model out as layers of their own: a plain GPT of the "
              "same function, of its donor's class where that computes it. Steps of 1, nothing injected, no norm "
              "between passes.", "unroll", "MODEL", "DIR")  # fmt: skip
    required = parser.add_argument_group("required")
    required.add_argument("src", metavar="SRC", help="an export of ours or a Megatron checkpoint")
    required.add_argument("out", metavar="OUT", help="model folder to make")
    _add_files(parser)
    _add_proof(parser)


def _add_files(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (default: the model's own)")
    files = parser.add_argument_group("weights")
    files.add_argument("--max-shard-size", type=_bytes, metavar="SIZE", default="5GB",
                       help="of a file, such as 500MB (default: %(default)s)")  # fmt: skip
    return files


def _bytes(text: str) -> int:
    """5GB, 500MB or a number, in powers of 1000 as transformers counts them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])B)?", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 500MB, but is {text!r}")
    return int(float(found[1]) * 1000 ** (" KMGT".index(found[2] or " ")))


def _add_proof(parser: argparse.ArgumentParser) -> None:
    proof = parser.add_argument_group("proof")
    proof.add_argument("--no-proof", action="store_true", help="do not compare logits; the output is then unproven")
    proof.add_argument("--proof-dtype", choices=("float32", "float64"), default="float32", help="compare logits in it")


def run(args: argparse.Namespace) -> None:
    """Convert or compare; the last line on stdout is JSON."""
    import torch

    from megatron_recursive.backends import cpu

    cpu.install(on_purpose=True)  # Megatron would compute its rotary positions on a GPU, and the rest here
    from megatron_recursive.hf.convert import donor_import as convert
    from megatron_recursive.hf.convert import export, unroll, verify

    dtype = None if args.no_proof else getattr(torch, args.proof_dtype)
    agreed = True
    if args.action == "import":
        recursion = knobs_in(vars(args))
        stacks = StackChoice(**{name: getattr(args, name) for name in (*STACKS, "from_analysis", "preset")})
        selection = args.layer_selection or ("uniform" if args.num_layers is not None else None)
        report = convert.import_model(args.hf, args.out, convert.ImportOptions(
            recursion, selection, args.num_layers, args.layers, args.untie_embeddings,
            args.resize_vocab, dtype, stacks))  # fmt: skip
    elif args.action == "export":
        weights = None if args.dtype is None else getattr(torch, args.dtype)
        report = export.export_model(
            args.ckpt, args.out, args.tokenizer, dtype, dtype=weights, shard_bytes=args.max_shard_size,
            as_published=args.as_published, averaged=args.ema, lora=args.lora)  # fmt: skip
    elif args.action == "unroll":
        report = unroll.unroll_model(
            args.src, args.out, dtype, shard_bytes=args.max_shard_size, tokenizer=args.tokenizer)  # fmt: skip
    else:
        report = verify.verify(args.a, args.b, dtype)
        agreed = verify.agree(report)
    print(json.dumps(report.summary()))
    if not agreed:
        raise SystemExit(1)
