"""How a run ends other than well: a sentence, or a traceback in a file that the last line names; one rank speaks.

The ranks that end for the same reason agree through the store at which they have met (torchrun's, or rank 0's): the
first to write its number there speaks. Under torchrun the sentence also goes into the elastic error file, so that its
closing summary carries it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from megatron_recursive.errors import EXIT_USER_ERROR, UserError, leave_at_once
from megatron_recursive.training import console, profiling

EXIT_INTERRUPTED = 130
PATIENCE = 30.0  # seconds to look for the other ranks: they may still be importing
GRACE = 1.0  # seconds after the sentence, since torchrun ends every rank as soon as one has left

# What a collective says on a rank whose peer went away: a consequence, not the cause.
PEER_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Socket closed|remote process exited", re.IGNORECASE)


def end_with_sentence(error: UserError) -> NoReturn:
    """A user's mistake: one sentence on stderr, exit code 2."""
    tell(str(error))
    _leave(EXIT_USER_ERROR)


def tell(sentence: str) -> None:
    """Say why the run ends, unless another rank has."""
    record_error(sentence)
    if _is_the_one_that_speaks():
        console.complain(f"error: {sentence}")


def end_with_traceback(error: BaseException) -> NoReturn:
    """Anything else (out of memory, NCCL, a defect): its traceback goes to this rank's log, exit code 1."""
    said = traceback.format_exception(error)
    text = " ".join(str(error).split())[:200]
    path = console.keep("".join(said))
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    sentence = f"Rank {os.environ.get('RANK', '0')} failed{_at_iteration()}: {what}"
    record_error(sentence, "".join(said))
    if PEER_LOST.search(text):
        time.sleep(2 * GRACE)  # let the rank speak that failed first
    if _is_the_one_that_speaks():
        console.complain(f"error: {sentence.rstrip('.')}; the traceback is in {path}.")
    _leave(1)


def record_error(sentence: str, trace: str | None = None) -> None:
    """Write torch elastic's error file, where torchrun has named one."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    now = datetime.datetime.now(datetime.UTC)
    extra = {"py_callstack": trace or sentence, "timestamp": str(int(now.timestamp()))}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}), encoding="utf-8")


def watch_for_interrupts() -> None:
    """Ctrl-C ends this rank at once, in a sentence; where it is being profiled, once the trace is written.

    A thread reads the signal's number from the wake-up descriptor, which is written at once, while Python's own
    handlers wait for the main thread: that may sit in a collective of which its peer is gone.
    """
    if "SIGINT" in sys.argv:  # --exit-signal SIGINT: Megatron's own
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: profiling.stop_all())
    threading.Thread(target=_wait_for_interrupt, args=(reader,), name="interrupts", daemon=True).start()


def _wait_for_interrupt(reader: int) -> None:
    while signal.SIGINT not in os.read(reader, 64):
        pass
    sentence = f"stopped by Ctrl-C{_at_iteration()}; {_what_goes_on()}."
    record_error(sentence)
    if int(os.environ.get("RANK", "0")) == 0:  # every rank of a terminal's job is told
        console.complain(sentence)
    deadline = time.monotonic() + PATIENCE
    while profiling.running and time.monotonic() < deadline:
        time.sleep(0.05)
    leave_at_once(EXIT_INTERRUPTED)


def _arguments() -> Any:
    """Megatron's arguments; None before they are set."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    return getattr(global_vars, "_GLOBAL_ARGS", None)


def _at_iteration() -> str:
    iteration = getattr(_arguments(), "curr_iteration", None)
    return f" at iteration {iteration + 1}" if iteration is not None else " before training began"


def _what_goes_on() -> str:
    args = _arguments()
    if args is None:
        return "nothing was trained"
    if args.save is None:
        return "nothing is kept, since --save was not given"
    from megatron_recursive.training.checkpoint_folders import last_iteration, saving_root

    iteration = last_iteration(Path(args.save), saving_root(args, passing=True))
    if iteration is None:
        return f"nothing was saved yet (--save-interval {args.save_interval}), so that the same command starts anew"
    last = f"the last checkpoint is iteration {iteration} in {args.save}"
    if args.load is not None and Path(args.load).resolve() == Path(args.save).resolve():
        return f"{last}, and the same command goes on from there"
    return f"{last}; add --load {args.save} to go on from there"


def _is_the_one_that_speaks() -> bool:
    """Whether no other rank has said why the run ends. A rank that finds nobody to ask speaks."""
    mine = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        store = job_store()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        speaks = store.compare_set(f"megatron_recursive/said/{attempt}", "", mine) == mine.encode()
        store.add("megatron_recursive/arrived", 1)
    except Exception:  # whatever keeps the ranks from meeting: the reader must be told
        return True
    if _hosts_the_store(mine):
        _stores.append(store)
    return speaks


_stores: list[Any] = []  # what rank 0 keeps open for the ranks that come later


def _hosts_the_store(rank: str) -> bool:
    """Under torchrun its agent does; otherwise rank 0, of whichever process group it has made or would have made."""
    return rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def job_store(patience: float = PATIENCE) -> Any:
    """Where the ranks of this job meet, before and after process groups exist; rank 0 keeps it open until it ends."""
    from torch import distributed

    if distributed.is_initialized():
        return distributed.distributed_c10d._get_default_store()
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = _hosts_the_store(os.environ.get("RANK", "0"))
    if not hosts:
        _wait_for_host(where, patience)
    limit = datetime.timedelta(seconds=patience)
    # multi_tenant: the process group will be made at the same port, by this process.
    store = distributed.TCPStore(*where, None, hosts, timeout=limit, wait_for_workers=False, multi_tenant=True)
    if hosts:
        _kept.append(store)
        os.environ["MASTER_PORT"] = str(store.port)  # 0 in a world of one process: any that is free
    return store


_kept: list[Any] = []


def _wait_for_host(where: tuple[str, int], patience: float) -> None:
    """Until somebody listens there; torch's own attempts would write their stacks to stderr."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(where, timeout=PATIENCE).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _leave(code: int) -> NoReturn:
    """The rank at which the others ask waits for them, the others for the one that speaks."""
    deadline = time.monotonic() + PATIENCE
    for store in _stores:
        with contextlib.suppress(Exception):
            while store.add("megatron_recursive/arrived", 0) < int(os.environ["WORLD_SIZE"]):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(GRACE)
    leave_at_once(code)
