"""``megatron-recursive convert``: import, export and verify."""

from __future__ import annotations

import argparse
import json
import re

from megatron_recursive.command_line import example
from megatron_recursive.plan.recursion_config import FunctionKnobs, HeadKnobs, add_recursion_arguments, knobs_in

SUMMARY = "Convert between Hugging Face models and Megatron checkpoints, with a proof at every run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, prog=parser.prog, title="actions, each with a --help of its own",
        metavar="{import,export,verify}",
    )  # fmt: skip
    _add_import(actions.add_parser("import", help="a Hugging Face model to a Megatron checkpoint"))
    _add_export(actions.add_parser("export", help="a Megatron checkpoint to a Hugging Face folder"))
    verifier = actions.add_parser("verify", help="compare two folders or checkpoints; exit code 1 if they differ")
    _describe(verifier, "Compare two models tensor by tensor, and their logits.", "verify", "MODEL", "CKPT")
    required = verifier.add_argument_group("required: a Hugging Face folder or a Megatron checkpoint each")
    required.add_argument("a", metavar="A")
    required.add_argument("b", metavar="B")
    _add_proof(verifier)
    parser.epilog = example("convert", "import", "--hf", "MODEL", "--out", "CKPT", "--state-norm", "none")


def _describe(parser: argparse.ArgumentParser, text: str, *words: str) -> None:
    parser.description = text
    parser.epilog = example("convert", *words)


def _add_import(parser: argparse.ArgumentParser) -> None:
    _describe(parser, "Convert a Hugging Face model to a Megatron checkpoint, and print the line that trains on.",
              "import", "--hf", "MODEL", "--out", "CKPT", "--num-refinement-blocks", "1",
              "--num-latent-refinements", "1", "--state-norm", "none")  # fmt: skip
    required = parser.add_argument_group("required")
    required.add_argument("--hf", required=True, metavar="MODEL", help="a folder, a .gguf file, or a cached hub name")
    required.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to make")
    shape = parser.add_argument_group("layers and embedding")
    shape.add_argument("--layer-selection", choices=("uniform", "first", "last", "middle"),
                       help="which layers --num-layers keeps (default: uniform)")  # fmt: skip
    shape.add_argument("--num-layers", type=int, metavar="K", help="how many layers to keep (default: all)")
    shape.add_argument("--layers", metavar="I,J,...", help="the layers to keep, by number from 0")
    shape.add_argument("--untie-embeddings", action="store_true", help="give the head a copy of the embedding")
    shape.add_argument("--resize-vocab", action="store_true",
                       help="grow the embedding to all ids of the tokenizer; new rows are the mean of the others")
    # What is not given is the source's own, where it is a model of ours.
    add_recursion_arguments(parser, (FunctionKnobs, HeadKnobs), only_given=True)
    _add_proof(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _describe(parser, "Convert a Megatron checkpoint to a folder for AutoModelForCausalLM.from_pretrained(DIR, "
              "trust_remote_code=True).", "export", "--ckpt", "CKPT", "--out", "DIR")  # fmt: skip
    required = parser.add_argument_group("required")
    required.add_argument("--ckpt", required=True, metavar="CKPT", help="a --save folder, or one iteration's folder")
    required.add_argument("--out", required=True, metavar="DIR", help="model folder to make")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (default: the one trained with)")
    files = parser.add_argument_group("weights")
    files.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="of the weights (default: as they are stored); a halting head keeps its own")
    files.add_argument("--ema", action="store_true", help="the averaged weights, of a run with --ema-decay")
    files.add_argument("--max-shard-size", type=_bytes, metavar="SIZE", default="5GB",
                       help="of a file, such as 500MB (default: %(default)s)")  # fmt: skip
    _add_proof(parser)


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
    from megatron_recursive.hf.convert import export, verify

    dtype = None if args.no_proof else getattr(torch, args.proof_dtype)
    agreed = True
    if args.action == "import":
        recursion = knobs_in(vars(args))
        selection = args.layer_selection or ("uniform" if args.num_layers is not None else None)
        report = convert.import_model(args.hf, args.out, convert.ImportOptions(
            recursion, selection, args.num_layers, args.layers, args.untie_embeddings,
            args.resize_vocab, dtype))  # fmt: skip
    elif args.action == "export":
        weights = None if args.dtype is None else getattr(torch, args.dtype)
        report = export.export_model(
            args.ckpt, args.out, args.tokenizer, dtype, dtype=weights, shard_bytes=args.max_shard_size,
            averaged=args.ema)  # fmt: skip
    else:
        report = verify.verify(args.a, args.b, dtype)
        agreed = verify.agree(report)
    print(json.dumps(report.summary()))
    if not agreed:
        raise SystemExit(1)
