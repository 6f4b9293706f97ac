"""Patch of megatron-core 0.19: a PyTorch profiler that an exit finds running is stopped, and writes what it has.

Megatron makes ``torch.profiler.profile`` in ``train`` and stops it after --profile-step-end alone, in a local variable;
left running it brings the process down with a segmentation fault at its end.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from megatron_recursive.training import profiling


@contextlib.contextmanager
def stopped_at_exit(args: argparse.Namespace) -> Iterator[None]:
    """Around training, under --profile."""
    if not (args.profile and args.use_pytorch_profiler):
        yield
        return
    from torch import profiler

    class Profile(profiler.profile):
        stopping = False

        def start(self) -> None:
            profiling.running.append(self)
            super().start()

        def stop(self) -> None:
            if not self.stopping:  # a Ctrl-C may come while the trace is written
                self.stopping = True
                super().stop()
                profiling.running.remove(self)

    original = profiler.profile
    setattr(profiler, "profile", Profile)  # noqa: B010
    try:
        yield
    finally:
        setattr(profiler, "profile", original)  # noqa: B010
        profiling.stop_all()
