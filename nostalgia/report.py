"""``python -m nostalgia.report RUN_DIR ...``: the report of a run, or of several side by side, as one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nostalgia.utils.arguments import CommandParser, ended

EPILOG = """examples:
  python -m nostalgia.report runs/demo/latest                     writes runs/demo/latest/results/report.html
  python -m nostalgia.report runs/demo/2* --out comparison.html   methods and seeds side by side, tables to paste

Of several runs the comparison is printed too.
Exit codes: 0 done, 2 wrong usage or a file that cannot be written, 3 no such run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    return ended(_main, arguments)


def _main(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="nostalgia.report",
        usage="python -m nostalgia.report RUN_DIR [RUN_DIR ...] [--out FILE] [--figure MODULE:FUNCTION]",
        description="Write the report of a run, finished or not; several runs are put side by side.",
        epilog=EPILOG,
    )
    parser.run_folders()
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN_DIR/results/report.html, ./report.html for several runs"
    )
    parser.own_figures()
    flags = parser.parse_args(arguments)
    report(flags.runs, flags.out, flags.figure)


def report(runs: Sequence[Path], out: Path | None = None, own_figures: Sequence[str] = ()) -> None:
    """Write the report and print where it is, after the comparison of those runs, if several, that are finished."""
    from nostalgia.analysis.compare import compare
    from nostalgia.analysis.report import write_report
    from nostalgia.analysis.run_folder import read_run
    from nostalgia.logging.streams import make_console

    written = write_report(runs, out, own_figures=own_figures)
    finished = [run for run in runs if read_run(run).results is not None]
    if len(runs) > 1 and finished:
        compare(finished, make_console())
    if len(runs) == 1 and (left := set(_figures_of(runs[0])) - set(own_figures)):
        # Not of itself: a folder may come from others, and to draw them is to run the code that it names.
        flags = " ".join(f"--figure {word}" for word in sorted(left))
        print(f"note: the run drew figures of its own; {flags} does again")
    print(written)


def _figures_of(run: Path) -> list[str]:
    """``logger.figures`` of the run's configuration."""
    from nostalgia.analysis.run_folder import read_run

    logger = read_run(run).config.get("logger")
    figures = logger.get("figures") if isinstance(logger, dict) else None
    return [str(word) for word in figures] if isinstance(figures, list) else []


if __name__ == "__main__":
    sys.exit(main())
