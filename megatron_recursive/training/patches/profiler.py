"""Patch of megatron-core 0.19: a PyTorch profiler that an exit finds running is stopped, and writes what it has.

Megatron makes ``torch.profiler.profile`` in ``train`` and stops it after --profile-step-end alone, in a local variable;
left running it brings the process down with a segmentation fault at its end.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stopped_at_exit(args: argparse.Namespace) -> Iterator[None]:
    """Around training, under --profile."""
    if not (args.profile and args.use_pytorch_profiler):
        yield
        return
    from torch import profiler

    running: list[Any] = []

    class Profile(profiler.profile):
        def start(self) -> None:
            running.append(self)
            super().start()

        def stop(self) -> None:
            running.remove(self)
            super().stop()

    original = profiler.profile
    setattr(profiler, "profile", Profile)  # noqa: B010
    try:
        yield
    finally:
        setattr(profiler, "profile", original)  # noqa: B010
        for each in list(running):
            each.stop()
            if each.execution_trace_observer is not None:
                each.execution_trace_observer.unregister_callback()
