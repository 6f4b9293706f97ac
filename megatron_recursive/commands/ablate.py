"""``megatron-recursive ablate``."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import shlex
import textwrap
from typing import TYPE_CHECKING

from megatron_recursive.ablation.config import SCHEMA, read_config
from megatron_recursive.command_line import PROGRAM, example
from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    from megatron_recursive.ablation.runs import Study

SUMMARY = "Train arms x learning rates x seeds at equal tokens or FLOPs, and say what beats what."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train every arm of a YAML file at each of its learning rates with the first seed, and at the best of them "
        "with the others. results.json, .md and .png in the output folder are renewed after each run. The same command "
        "goes on where it was stopped or killed: what is done stays, what was on its way goes on from its checkpoint."
    )
    required = parser.add_argument_group("required")
    required.add_argument("config", metavar="CONFIG", help="a YAML file, such as the one below")
    options = parser.add_argument_group("options")
    options.add_argument("--output", metavar="DIR", help="folder of runs and results (default: the file's output)")
    options.add_argument("--jobs", type=int, help="processes at a time (default: one a CUDA device, or else as many as "
                         "the CPUs hold with OMP_NUM_THREADS threads each, 1 unless set)")  # fmt: skip
    options.add_argument("--dry-run", action="store_true", help="list the runs, their FLOPs and what is left; run none")
    parser.epilog = example("ablate", "examples/ablations/recursion.yaml") + textwrap.indent(f"\n\n{SCHEMA}", "  ")


def run(args: argparse.Namespace) -> None:
    ablation = read_config(args.config, args.output)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1.")
    from megatron_recursive.ablation.results import write_results
    from megatron_recursive.ablation.runs import Study, facts_of
    from megatron_recursive.ablation.schedule import Schedule, places

    study, free = Study(ablation, facts_of(ablation)), places(args.jobs)
    most = max(ablation.arms, key=lambda arm: arm.processes)
    if any(free) and most.processes > len(free):
        raise UserError(f"arms.{most.name} wants {most.processes} processes, but has {len(free)} CUDA devices.")
    study.read()
    if args.dry_run:
        return print("\n".join(_listed(study, len(free))))
    line = shlex.join([PROGRAM, "ablate", args.config, *(["--output", args.output] if args.output else [])])
    picture = importlib.util.find_spec("matplotlib") is not None
    refresh = functools.partial(write_results, study, line, picture=picture)
    Schedule(study, free, refresh).go()
    said = [each["said"] for each in refresh()["comparisons"]]
    files = f"{ablation.output / 'results.md'}, .json{', .png' if picture else ' (the picture needs matplotlib)'}"
    print(*said, files, sep="\n")
    if study.failures:
        print(f"{len(study.failures)} of {study.size()[0]} runs failed; the same command tries them again.")
        raise SystemExit(1)


def _listed(study: Study, jobs: int) -> list[str]:
    """Every run with its FLOPs and where it stands, and how long the rest takes by those that are done."""
    lines, (number, total) = [], study.size()
    for run in study.known():
        state = f"{run.share():.0%} trained" if run.share() else "to do"
        if run in study.results:
            state = f"held-out loss {study.results[run]['loss']:.4f}"
        lines.append(f"{run}: {run.iterations:,} iterations, {run.flops:.3g} FLOPs, {state}")
    if number > len(lines):
        lines.append(f"and {number - len(lines)} more, with the other seeds at the best rate of each arm")
    left, timed = total - study.spent(), [r for r in study.results.values() if r["seconds"]]
    speed = jobs * sum(r["FLOPs"] for r in timed) / sum(r["seconds"] for r in timed) if timed else 0
    takes = f"about {left / speed / 3600:.2f} hours, {jobs} at a time" if speed else "no run has been timed yet"
    return [*lines, f"{number} runs of {total:.3g} FLOPs, of which {left:.3g} are left: {takes}"]
