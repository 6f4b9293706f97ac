"""The flags of optimizers, learning-rate factors and averaged weights, and what they exclude."""

from __future__ import annotations

import argparse
import math

from megatron.core.optimizer import emerging_optimizers

from megatron_recursive.errors import UserError
from megatron_recursive.optimizers.parameter_groups import ROLES, rate_factors
from megatron_recursive.optimizers.registry import OURS
from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans
from megatron_recursive.plan.knobs import flag_of

MEGATRONS = ("adam", "sgd")  # which fp16 and CPU offloading know
KNOWN = (*MEGATRONS, "muon", *OURS)
NEEDS = {"core": "layers that are applied more than once", "adapter": "an adapter", "head": "a head or gate"}


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """The names that ``--optimizer`` takes here, Muon on whole matrices, and our own flags."""
    flags = {action.dest: action for action in parser._actions}
    flags["optimizer"].choices, flags["muon_scalar_optimizer"].choices = KNOWN, ("adam",)
    flags["optimizer"].help = "Muon moves the matrices of layers and adapters, Adam the rest."
    parser.set_defaults(muon_tp_mode="duplicated")  # Megatron's blockwise makes another function of each TP size
    group = parser.add_argument_group("optimizers of recursive runs")
    whose = {"core": "the layers that a recursion applies more than once", "adapter": "what joins states and inputs",
             "head": "halting heads and gates (the output layer has --decoupled-lr)"}  # fmt: skip
    for role in ROLES:
        group.add_argument(
            f"--{role}-lr-factor", type=float, default=1.0, metavar="X",
            help=f"Multiply the learning rate of {whose[role]} (default: 1).",
        )  # fmt: skip
    group.add_argument(
        "--throttle", action="store_true",
        help="Divide the learning rate of the layers that are applied more than once by how often with gradient.",
    )
    group.add_argument(
        "--ema-decay", type=float, metavar="D",
        help="Keep an exponential moving average of the fp32 weights, D times itself and 1 - D times the weights a "
        "step; it is stored in checkpoints, and exported by convert export --ema.",
    )
    group.add_argument("--evaluate-ema", action="store_true", help="Evaluate the averaged weights (--ema-decay).")


def refuse_optimizers(args: argparse.Namespace) -> None:
    """What optimizers other than Adam and SGD, and averages, do not go with."""
    for role in ROLES:
        if not 0 <= getattr(args, f"{role}_lr_factor") < math.inf:
            raise UserError(f"--{role}-lr-factor is {getattr(args, f'{role}_lr_factor')}; give a number of 0 or more.")
    _refuse_average(args)
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        raise UserError("--optimizer sgd does not go with --use-distributed-optimizer; leave that out, or use adam.")
    if args.optimizer in MEGATRONS:
        return
    for flag, given in (("--use-distributed-optimizer", args.use_distributed_optimizer), ("--fp16", args.fp16),
                        ("--optimizer-cpu-offload", args.optimizer_cpu_offload),
                        ("--enable-ft-package", args.enable_ft_package)):  # fmt: skip
        if given:
            raise UserError(f"--optimizer {args.optimizer} does not go with {flag} yet; leave that out, or use adam.")
    if args.optimizer == "muon" and emerging_optimizers.HAVE_EMERGING_OPTIMIZERS:
        types = [each for each in emerging_optimizers.get_supported_coefficient_types() if each != "custom"]
        if args.muon_coefficient_type not in types:
            raise UserError(f"--muon-coefficient-type {args.muon_coefficient_type} is none of {', '.join(types)}.")


def _refuse_average(args: argparse.Namespace) -> None:
    if args.ema_decay is None:
        if args.evaluate_ema:
            raise UserError("--evaluate-ema needs --ema-decay, such as --ema-decay 0.999.")
        return
    if not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema-decay is {args.ema_decay}; give a number of at least 0 and below 1.")
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload", "no_save_optim"):
        if getattr(args, name):
            raise UserError(f"--ema-decay does not go with {flag_of(name)}; leave that out.")
    if args.evaluate_ema and args.skip_train:
        raise UserError("--evaluate-ema does not go with --skip-train; export with convert export --ema instead.")


def settle_rates(args: argparse.Namespace, plan: RecursionPlan, recursion: RecursionConfig) -> None:
    """Store the factors by part of the model in the arguments, which every checkpoint carries."""
    asked = {role: getattr(args, f"{role}_lr_factor") for role in ROLES}
    everything = {role: rate_factors(plan, {**dict.fromkeys(ROLES, 1.0), role: 2.0}, throttle=False) for role in ROLES}
    for role in ROLES:
        if not everything[role] and (asked[role] != 1.0 or (role == "core" and args.throttle)):
            flag = "--throttle" if asked[role] == 1.0 else f"--{role}-lr-factor"
            raise UserError(f"{flag} needs {NEEDS[role]}, which this model does not have; leave it out.")
    if args.lr_warmup_init and (args.throttle or set(asked.values()) != {1.0}):
        raise UserError(f"--lr-warmup-init {args.lr_warmup_init:g} starts all weights at one rate, which the factors "
                        "of parts (--core-lr-factor and others, --throttle) do not scale; leave it out.")  # fmt: skip
    drawn = StepPlans(recursion, plan).drawn() if recursion.recurrence_distribution != "fixed" else ()
    args.rate_factors = rate_factors(plan, asked, throttle=args.throttle, drawn=drawn)
