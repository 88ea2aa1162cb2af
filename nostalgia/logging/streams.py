"""Consoles whose failures do not end the run: after a closed pipe or a lost terminal nothing more is printed."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console


class ForgivingStream:
    """Writes to ``stream`` until that fails, then to nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        if not self.broken:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):  # ValueError: the stream is closed
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if not self.broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return not self.broken and not self._stream.closed and self._stream.isatty()

    def _give_up(self) -> None:
        self.broken = True
        if self._stream is not sys.__stdout__ or self._stream.closed:
            return
        # What is still buffered would fail again when the interpreter flushes it at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def make_console(quiet: bool = False, stream: TextIO | None = None, width: int | None = None) -> Console:
    """A rich console on standard output (or ``stream``); 100 columns where that is not a terminal."""
    target = ForgivingStream(stream if stream is not None else sys.stdout)
    if width is None and not target.isatty() and "COLUMNS" not in os.environ:
        width = 100
    return Console(file=target, quiet=quiet, width=width, emoji=False)  # type: ignore[arg-type]
