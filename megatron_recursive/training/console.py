"""Where the words of a run go: what concerns its reader to the terminal or pipe, all the rest to a log beside the run.

Megatron, torch and the libraries below them say some two thousand lines before the first iteration. :func:`install`
puts a :class:`Tap` in the place of ``sys.stdout`` and ``sys.stderr``: every line goes to this rank's log,
``SAVE/logs/rank-N.log``, and those that the log style shows go on. What this package itself has to say passes through
:func:`say` and :func:`complain`. Text that native code writes to the file descriptors is not touched.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Literal

Style = Literal["compact", "megatron"]
STYLES: tuple[Style, ...] = ("compact", "megatron")

# Megatron's own lines that people (and their scripts) read, shown in the megatron style.
SHOWN = re.compile(
    r" ?\[\d{4}-\d\d-\d\d [\d:.]+\] iteration +\d+/"
    r"| ?validation\S* loss at "
    r"| *(\[.*\] )?saving checkpoint at iteration| *(\[.*\] )?successfully (saved|loaded) checkpoint "
    r"|(\[.*\] )?exiting program "
)
TIMERS = re.compile(r".*\((min, max|max)\) time across ranks|    [\w-]+ \.{3,}: ")  # of --timing-log-level
# exp of a probability, a cosine or a count of blocks is no perplexity.
NO_PERPLEXITY = re.compile(r"(?<=\| )(?![^|]*loss)[^|]* PPL: [^|]*\| ?")

_current: Console | None = None


class Console:
    """The real streams of this rank, its log, and the style in which a run is shown."""

    def __init__(self) -> None:
        self.out, self.err = sys.stdout, sys.stderr
        self.style: Style = "compact" if self.out.isatty() else "megatron"
        self.timers = False
        self.path: Path | None = None
        self._log: IO[str] = io.StringIO()  # until it is known where the run keeps its files
        self._lock = threading.RLock()

    def line(self, text: str, *, shown: bool) -> None:
        """Take one line that a library wrote."""
        with self._lock:
            try:
                self._log.write(text + "\n")
                self._log.flush()
            except OSError:  # its disk is full, which is being told: what follows is kept nowhere
                self._log = open(os.devnull, "w", encoding="utf-8")
        if self.style == "megatron" and ((shown and SHOWN.match(text)) or (self.timers and TIMERS.match(text))):
            self.show(NO_PERPLEXITY.sub("", text))

    def show(self, text: str, stream: IO[str] | None = None) -> None:
        with self._lock:
            print(text, file=stream or self.out, flush=True)

    def open_log(self, save: str | None) -> Path:
        """Begin the log file: below ``save``, or in a temporary folder where the run saves nothing."""
        if self.path is None:
            rank = os.environ.get("RANK", "0")
            folder = Path(save) / "logs" if save and "://" not in save else _temporary_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"rank-{rank}.log"
            with self._lock:
                early, self._log = self._log, self.path.open("a", encoding="utf-8", errors="replace")
                assert isinstance(early, io.StringIO)
                self._log.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n{early.getvalue()}")
                self._log.flush()
        return self.path


class Tap(io.TextIOBase):
    """Stands for a standard stream and hands its complete lines to the console."""

    def __init__(self, console: Console, original: IO[str], *, shown: bool) -> None:
        self._console, self._original, self._shown, self._rest = console, original, shown, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._console.line(line.rsplit("\r", 1)[-1], shown=self._shown)
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._original.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._original, "encoding", "utf-8")


def install() -> Console:
    """Take over this process's standard streams. Call it once, before Megatron is imported."""
    global _current
    _current = Console()
    sys.stdout = Tap(_current, sys.stdout, shown=True)
    sys.stderr = Tap(_current, sys.stderr, shown=False)
    return _current


def begin(style: str | None, save: str | None, *, timers: bool) -> None:
    """Once the flags are known: the style asked for (None: by the terminal), and the log. Does nothing uninstalled.

    ``timers`` shows Megatron's tables of times in the megatron style too.
    """
    if _current is not None:
        _current.timers = timers
        if style is not None:
            _current.style = style  # type: ignore[assignment]
        _current.open_log(save)


def style() -> Style:
    return _current.style if _current is not None else "megatron"


def say(text: str) -> None:
    """Tell the reader, on stdout and in the log."""
    if _current is None:
        print(text, flush=True)
        return
    for line in text.split("\n"):
        _current.line(line, shown=False)
    _current.show(text)


def complain(text: str) -> None:
    """Tell the reader on stderr, and in the log."""
    if _current is None:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
        return
    _current.line(text, shown=False)
    _current.show(text, _current.err)


def keep(text: str) -> Path | None:
    """Write to the log alone, a traceback say; returns the log's path (None where nothing was installed)."""
    if _current is None:
        return None
    path = _current.open_log(None)
    for line in text.rstrip("\n").split("\n"):
        _current.line(line, shown=False)
    return path


def log_path() -> Path | None:
    return _current.path if _current is not None else None


def _temporary_folder() -> Path:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    started = run if run != "none" else str(os.getppid() if "LOCAL_RANK" in os.environ else os.getpid())
    return Path(tempfile.gettempdir()) / f"megatron-recursive-{started}"
