"""What every command has in common: the parser of its options, and how an error ends it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nostalgia.errors import NostalgiaError, UsageError
from nostalgia.utils.exit_code import leave_on_interrupt


class CommandParser(argparse.ArgumentParser):
    """Whole option names only, a wrong line is a UsageError; ``epilog`` is shown as it is laid out."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}; --help shows examples")

    def run_folders(self) -> None:
        """Add ``runs``, folders, one or more."""
        self.add_argument("runs", nargs="+", metavar="RUN_DIR", action=_RunFolders, help="folder of a run")

    def own_figures(self) -> None:
        """Add ``--figure``, a list."""
        self.add_argument(
            "--figure",
            action="append",
            default=[],
            metavar="MODULE:FUNCTION",
            help="a figure of your own too: a function of one run's folder (docs/runs.md); may be repeated",
        )


class _RunFolders(argparse.Action):
    """Paths; without the log that a sweep leaves beside each folder, which ``runs/demo/finetune/seed*`` brings along."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = [Path(value) for value in values]
        runs = [path for path in given if path.suffix != ".log" or path.with_suffix("") not in given]
        setattr(namespace, self.dest, runs)


def ended(command: Callable[[list[str]], int | None], arguments: Sequence[str] | None) -> int:
    """Exit code of ``command`` with ``arguments`` (None: the program's own); an error of ours or Ctrl-C is a line on stderr."""
    if arguments is None:
        leave_on_interrupt(lambda: print("interrupted", file=sys.stderr))
    try:
        return command(sys.argv[1:] if arguments is None else list(arguments)) or 0
    except NostalgiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
