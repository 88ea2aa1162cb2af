"""``accelerate launch -m nostalgia.train``: a run, as the command line and the files under ``configs/`` say."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nostalgia.command import run_command

if TYPE_CHECKING:
    from accelerate import Accelerator

    from nostalgia.config import Request


def main(argv: list[str] | None = None) -> int:
    """Exit codes as `nostalgia.command.run_command` says."""
    return run_command(argv, _parse, _run)


# Imported in the command, where Ctrl-C is one line already.


def _parse(argv: list[str]) -> Request:
    from nostalgia.config import parse

    return parse(argv)


def _run(request: Request, accelerator: Accelerator, precision: str) -> None:
    from nostalgia.experiment.run import run

    run(request, accelerator, precision)


if __name__ == "__main__":
    sys.exit(main())
