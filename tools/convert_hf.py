"""Convert between Hugging Face models and Megatron checkpoints, with a proof at every run: import, export, verify."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import warnings

import torch

from megatron_recursive.backends import cpu
from megatron_recursive.errors import report_user_errors
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.recursion_config import add_recursion_arguments

KNOBS = tuple(knob.name for knob in dataclasses.fields(RecursionConfig))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    proof = argparse.ArgumentParser(add_help=False)
    proof.add_argument("--no-proof", action="store_true", help="do not compare logits; the output is then unproven")
    proof.add_argument("--proof-dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")

    importer = commands.add_parser("import", parents=[proof], help="a Hugging Face model to a Megatron checkpoint")
    importer.add_argument("--hf", required=True, metavar="MODEL", help="a folder, a .gguf file, or a cached hub name")
    importer.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to make")
    importer.add_argument("--layer-selection", choices=("uniform", "first", "last", "middle"), help="layers to keep")
    importer.add_argument("--num-layers", type=int, metavar="K", help="how many layers to keep")
    importer.add_argument("--layers", metavar="I,J,...", help="the layers to keep, by number from 0")
    importer.add_argument("--untie-embeddings", action="store_true", help="give the head a copy of the embedding")
    add_recursion_arguments(importer)
    for action in importer._actions:
        if action.dest in KNOBS:
            action.default = argparse.SUPPRESS  # what is not given is the source's own, where it is a model of ours

    exporter = commands.add_parser("export", parents=[proof], help="a Megatron checkpoint to a Hugging Face folder")
    exporter.add_argument("--ckpt", required=True, metavar="CKPT", help="a --save folder, or one iteration's folder")
    exporter.add_argument("--out", required=True, metavar="DIR", help="model folder to make")
    exporter.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (default: the one trained with)")

    verifier = commands.add_parser("verify", parents=[proof], help="compare two folders or checkpoints")
    verifier.add_argument("a", metavar="A")
    verifier.add_argument("b", metavar="B")
    return parser.parse_args()


@report_user_errors
def main() -> None:
    args = parse_args()
    cpu.install()
    warnings.simplefilter("ignore")  # what Megatron says about optional packages at import
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron_recursive.hf import convert, export, verify

    dtype = None if args.no_proof else getattr(torch, args.proof_dtype)
    agreed = True
    if args.command == "import":
        recursion = {name: value for name, value in vars(args).items() if name in KNOBS}
        selection = args.layer_selection or ("uniform" if args.num_layers is not None else None)
        report = convert.import_model(args.hf, args.out, convert.ImportOptions(
            recursion, selection, args.num_layers, args.layers, args.untie_embeddings, dtype))  # fmt: skip
    elif args.command == "export":
        report = export.export_model(args.ckpt, args.out, args.tokenizer, dtype)
    else:
        report = verify.verify(args.a, args.b, dtype)
        agreed = verify.agree(report)
    print(json.dumps(report.summary()))
    if not agreed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
