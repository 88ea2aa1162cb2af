"""``python -m nostalgia.scripts.plot_all --results_dir RUN_DIR/results``: `nostalgia.figures` by its former name and flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nostalgia.errors import NotFoundError
from nostalgia.figures import draw, say
from nostalgia.utils.arguments import CommandParser, ended


def main(arguments: Sequence[str] | None = None) -> int:
    return ended(_main, arguments)


def _main(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="nostalgia.scripts.plot_all",
        usage="python -m nostalgia.scripts.plot_all --results_dir RUN_DIR/results [--log_csv FILE] [--mem_csv FILE]",
        description="Draw every figure a run folder allows into RESULTS_DIR/figures.",
        epilog="python -m nostalgia.figures RUN_DIR does the same.",
    )
    parser.add_argument("--results_dir", type=Path, required=True, help="RUN_DIR/results of any run, old or partial")
    parser.add_argument("--log_csv", type=Path, help="read this instead of RUN_DIR/metrics.csv")
    parser.add_argument("--mem_csv", type=Path, help="read this instead of RUN_DIR/memory.csv")
    parser.own_figures()
    flags = parser.parse_args(arguments)
    folder = flags.results_dir.resolve()
    # A run that broke off before its first result has no results folder yet: its logs can still be drawn.
    if not folder.is_dir() and not (folder.name == "results" and folder.parent.is_dir()):
        raise NotFoundError(f"--results_dir {flags.results_dir}: no such folder; it is RUN_DIR/results of a run")
    say(draw(folder.parent, folder / "figures", log_csv=flags.log_csv, mem_csv=flags.mem_csv, own=flags.figure))


if __name__ == "__main__":
    sys.exit(main())
