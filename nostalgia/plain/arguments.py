"""The parser of every command's options: a wrong line is a UsageError, which the command says in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from nostalgia.errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """Whole option names only; ``epilog`` is shown as it is laid out."""

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
