"""How a process ends, so that its exit code gets past the launcher. Imports nothing heavy: a refusal is quick."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable

_begun: Callable[[], None] | None = None


def already_ended() -> bool:
    """Whether this is a restart after an attempt that left a code which a restart would not change.

    75 is not one: a process that was told to stop because another died leaves it, and the restart goes on from there.
    """
    path = os.environ.get("NOSTALGIA_EXIT_FILE")
    if not path or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not os.path.isfile(path):
        return False
    with open(path, encoding="ascii") as file:
        code = file.read().strip()
    if code == "75" and os.environ.get("LOCAL_RANK", "0") == "0":
        open(path, "w", encoding="ascii").close()
    return code not in ("", "75")


def leave(exit_code: int, *, stuck: bool = False, at_once: bool = False) -> None:
    """End this process with ``exit_code``, whatever its other threads wait for; ``at_once``: what it has begun unfinished.

    Launchers turn any failure of a worker into 1, and restart it: where a launch script has named a file in
    ``NOSTALGIA_EXIT_FILE``, codes that a restart would not change are left there and the process ends with 0. With
    ``stuck`` it ends with the code all the same, or the launcher would wait for the rank that is stuck; a restart that
    follows finds the file (`already_ended`).
    """
    path = os.environ.get("NOSTALGIA_EXIT_FILE")
    if path and exit_code in (2, 3, 4, 75):
        with open(path, "w", encoding="ascii") as file:
            file.write(str(exit_code))
        exit_code = exit_code if stuck else 0
    if _begun is not None and not at_once:
        with contextlib.suppress(Exception):
            _begun()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by its reader: nothing could be shown any more
            stream.flush()
    os._exit(exit_code)


def finish_before_leaving(work: Callable[[], None]) -> None:
    """``work`` finishes what this process has begun in the background: `leave` does it first."""
    global _begun
    _begun = work


def leave_on_interrupt(tell: Callable[[], None]) -> None:
    """From here on Ctrl-C ends this process with 130, after ``tell``; what it forks, loaders' workers, without a word.

    Not by KeyboardInterrupt, which in the middle of an import comes out as an error of that module's own.
    """
    process = os.getpid()

    def interrupted(*_: object) -> None:
        if os.getpid() == process:
            tell()
        leave(130, at_once=True)

    signal.signal(signal.SIGINT, interrupted)
