"""How a process ends, so that its exit code gets past the launcher. Imports nothing heavy: a refusal is quick."""

from __future__ import annotations

import contextlib
import os
import sys


def forget_exit_code() -> None:
    """A run that begins, or begins again after a restart: what an earlier attempt left no longer counts."""
    path = os.environ.get("NOSTALGIA_EXIT_FILE")
    if path and os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        open(path, "w").close()


def leave(exit_code: int) -> None:
    """End this process at once with ``exit_code``, whatever its other threads wait for.

    Launchers turn any failure of a worker into 1, and restart it: where a launch script has named a file in
    ``NOSTALGIA_EXIT_FILE``, codes that a restart would not change are left there and the process ends with 0.
    """
    path = os.environ.get("NOSTALGIA_EXIT_FILE")
    if path and exit_code in (2, 3, 4, 75):
        with open(path, "w") as file:
            file.write(str(exit_code))
        exit_code = 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by its reader: nothing could be shown any more
            stream.flush()
    os._exit(exit_code)
