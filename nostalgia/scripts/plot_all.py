"""Draws every figure a run folder allows, old, unfinished or broken off as it may be.

    python -m nostalgia.scripts.plot_all --results_dir runs/demo/latest/results

writes results/figures/*.png, and says which figures could not be made and why. Exit codes: 0 done, 2 wrong
usage or a folder that cannot be written, 3 no such run or log file, or nothing in it to draw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nostalgia.errors import NostalgiaError, NotFoundError, UsageError
from nostalgia.reporting.drawing import Drawn, draw_run
from nostalgia.reporting.run_folder import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        drawn = plot_all(options.results_dir, log_csv=options.log_csv, mem_csv=options.mem_csv, own=options.figure)
    except NostalgiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, path in drawn.made.items():
        print(f"{name:<17} {path}")
    for name, reason in drawn.skipped.items():
        print(f"{name:<17} not made: {reason}")
    return 0


def plot_all(
    results_dir: Path, *, log_csv: Path | None = None, mem_csv: Path | None = None, own: Sequence[str] = ()
) -> Drawn:
    """Draw into ``results_dir``/figures; the run folder is the parent of ``results_dir``; ``own`` as in `draw_run`.

    Raises NotFoundError where there is no such folder or file, or nothing in it to draw; UsageError where the
    figures cannot be written.
    """
    for given in (log_csv, mem_csv):
        if given is not None and not given.is_file():
            raise NotFoundError(f"{given}: no such file")
    folder = results_dir.resolve()
    # A run that broke off before its first result has no results folder yet: its logs can still be drawn.
    if not folder.is_dir() and not (folder.name == "results" and folder.parent.is_dir()):
        raise NotFoundError(f"--results_dir {results_dir}: no such folder; it is RUN_DIR/results of a run")
    run = read_run(folder.parent, log_csv=log_csv, mem_csv=mem_csv)
    try:
        drawn = draw_run(run, folder / "figures", own)
    except OSError as error:
        raise UsageError(f"{folder / 'figures'}: cannot be written ({error.strerror})") from None
    if not drawn.made:
        raise NotFoundError(f"--results_dir {results_dir}: nothing to draw; {'; '.join(run.problems.values())}")
    return drawn


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nostalgia.scripts.plot_all",
        description="Draw every figure a run folder allows into RESULTS_DIR/figures.",
        epilog="example: python -m nostalgia.scripts.plot_all --results_dir runs/demo/latest/results",
    )
    parser.add_argument("--results_dir", type=Path, required=True, help="RUN_DIR/results of any run, old or partial")
    parser.add_argument("--log_csv", type=Path, help="read this instead of RUN_DIR/metrics.csv")
    parser.add_argument("--mem_csv", type=Path, help="read this instead of RUN_DIR/memory.csv")
    parser.add_argument(
        "--figure", action="append", default=[], metavar="MODULE:FUNCTION", help="draw this figure of your own too"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
