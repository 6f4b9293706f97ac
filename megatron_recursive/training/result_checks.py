"""What a run says when Megatron's checks of loss and gradients (--check-for-nan-in-loss-and-grad) stop it.

Megatron's rerun state machine runs the iteration once more on the same data. A bad result that comes again is saved
before the update, and the process exits with code 16 (run the same command on other hardware: it tells a fault of the
machine from one of the model) or 17 (told). Under ``--rerun-mode disabled`` it raises at once. Those exit codes are
kept; here the rank that saw the bad result says so in one sentence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from megatron.core import rerun_state_machine as machine_module
from megatron.training import get_args

from megatron_recursive.errors import leave_at_once
from megatron_recursive.training import ending

EXIT_CODES = (machine_module.EXIT_CODE_RESUME_TO_DISAMBIGUATE, machine_module.EXIT_CODE_FAILED_ON_RESULT_VALIDATION)
RAISED = re.compile(r"Rank (\d+), .*: Unexpected result .*\(message='(.*)'\)", re.DOTALL)


@contextlib.contextmanager
def said_in_a_sentence() -> Iterator[None]:
    """Around ``pretrain``: a stop for a bad result is told on stderr, by the rank that saw it."""
    try:
        yield
    except SystemExit as stop:
        if stop.code in EXIT_CODES:
            _say_what_failed()
        raise
    except RuntimeError as error:
        found = RAISED.search(str(error))
        if found is None:
            raise
        _say(int(found[1]), found[2], "")
        leave_at_once(EXIT_CODES[1])  # the other ranks wait in a collective


def _say_what_failed() -> None:
    machine = machine_module.get_rerun_state_machine()
    call = machine.failed_validation_call
    if call is not None:
        again = ", again when the iteration was repeated"
        _say(call.caller.rank, call.caller.message, again)


def _say(rank: int, what: str, again: str) -> None:
    # As the log line counts iterations; the state machine's own number runs one ahead (0.19.2).
    iteration = get_args().curr_iteration + 1
    ending.tell(
        f"Rank {rank} at iteration {iteration}: {what}{again}; the weights were not updated with it, so look at "
        "the learning rate (--lr, --lr-warmup-iters, --clip-grad) and the data, and start again from an earlier "
        "checkpoint (--ckpt-step), or switch the check off with --no-check-for-nan-in-loss-and-grad."
    )
