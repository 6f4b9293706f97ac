"""Errors that a user can mend, and the one way in which a command reports them."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR, EXIT_BROKEN_PIPE = 2, 141
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError


class UserError(Exception):
    """A mistake in a flag, a file or the surroundings.

    The message is one sentence: it names the flag, file or line, and how to mend it.
    """


def leave_at_once(code: int) -> NoReturn:
    """End this process without waiting for a collective or a thread, and the processes that it started with it."""
    for child in multiprocessing.active_children():  # a save leaves a server of Megatron's behind
        child.kill()
    sys.stdout.flush()
    os._exit(code)


def report_user_errors(main: Callable[..., object]) -> Callable[..., None]:
    """Wrap a command's ``main``: a :class:`UserError` becomes one line on stderr and exit code 2, no traceback.

    A reader that has read enough (``| head``) ends it without a word.
    """

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_has_left():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            raise SystemExit(EXIT_BROKEN_PIPE) from None
        except UserError as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_USER_ERROR) from None

    return run


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
