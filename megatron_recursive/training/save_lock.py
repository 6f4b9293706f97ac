"""One run at a time saves into a folder."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_recursive.backends.device import PATIENCE
from megatron_recursive.errors import UserError
from megatron_recursive.training import ending

LOCK = Path("logs", "lock")  # below --save


@contextlib.contextmanager
def saving_alone(args: argparse.Namespace) -> Iterator[None]:
    """Hold --save until this run ends, however it ends. Rank 0 does, and tells the others.

    The lock is of POSIX: unlike that of ``flock``, no child shares it that was forked (for the data, or to write), so
    that a command which was killed can be given again at once.

    Raises:
        UserError: on every rank, where another run holds it.
    """
    if args.save is None or args.skip_train or "://" in args.save:
        yield
        return
    with contextlib.ExitStack() as held:
        is_free = args.rank != 0 or _lock(Path(args.save) / LOCK, held)
        if args.world_size > 1:
            store, attempt = ending.job_store(PATIENCE), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            key = f"megatron_recursive/save/{attempt}"
            key = f"{key}/{store.add(f'{key}/rank {args.rank}', 1)}"  # a process may train several times
            if args.rank == 0:
                store.set(key, str(is_free))
            store.wait([key], datetime.timedelta(seconds=PATIENCE))
            is_free = store.get(key) == b"True"
        if not is_free:
            raise UserError(f"Another run is saving into --save {args.save}; wait for its end, or name another folder.")
        yield


def _lock(file: Path, held: contextlib.ExitStack) -> bool:
    """Whether no other process holds it; where there are no locks, or no file can be made, nobody does."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fcntl.lockf(held.enter_context(file.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
