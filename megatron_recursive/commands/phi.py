"""``megatron-recursive phi``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_recursive.command_line import example
from megatron_recursive.commands import shared
from megatron_recursive.errors import UserError

SUMMARY = "Fit how many unique layers a loop is worth, with its interval, to the losses of an ablation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fit L = E + A N^-alpha + B D^-beta to the held-out losses L of arms with D tokens, where layers that r passes "
        "go through count r^phi times in N (arXiv 2604.21106). At phi 1 a loop is worth its own layers, at 0 nothing."
    )
    required = parser.add_argument_group("required")
    required.add_argument("results", nargs="+", metavar="RESULTS", help="results.json of ablate, or "
                          "its folder: arms of three sizes and two numbers of loops, as in benchmarks/phi.yaml")
    options = parser.add_argument_group("options")
    options.add_argument("--draws", type=int, default=200, help="resamples of the arms that give the interval")
    options.add_argument("--seed", type=int, default=1, help="of these, and of where fits start")
    shared.add_output(options)
    parser.epilog = example("phi", "runs/ablations/phi")


def run(args: argparse.Namespace) -> None:
    if args.draws < 20 or args.seed < 0:
        raise UserError(f"--draws {args.draws} must be at least 20, and --seed {args.seed} at least 0.")
    from megatron_recursive.ablation.loop_worth import fit_phi, read_losses

    found = fit_phi(read_losses(args.results), draws=args.draws, seed=args.seed)
    shared.finish(args, {"format": "megatron-recursive phi", "version": 1, "results": args.results} | found, lines)


def lines(found: dict[str, Any]) -> list[str]:
    low, high = found["interval"]
    worth = ", ".join(f"{r} loops {unique:.2f}" for r, unique in found["worth"].items())
    return [
        f"phi = {found['phi']:.3f}, 95% interval {low:.3f} to {high:.3f} "
        f"({found['runs']} runs of {found['arms']} arms, {found['draws']} draws)",
        f"So many unique copies of the looped layers are worth: {worth}",
        "L = {E:.3f} + {A:.4g} N^-{alpha:.3f} + {B:.4g} D^-{beta:.3f}; R2 of log L {R2:.4f}".format(**found),
    ]
