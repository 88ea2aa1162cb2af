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
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN_DIR/results/report.html, ./report.html for several runs"
    )
    parser.own_figures()
    flags = parser.parse_args(arguments)
    report(flags.runs, flags.out, flags.figure)


def report(runs: Sequence[Path], out: Path | None = None, own_figures: Sequence[str] = ()) -> None:
    """Write the report and print where it is, after the comparison of those runs, if several, that are finished."""
    from nostalgia.reporting.compare import compare
    from nostalgia.reporting.report import write_report
    from nostalgia.reporting.streams import make_console

    written = write_report(runs, out, own_figures=own_figures)
    finished = [run for run in runs if (run / "results" / "results.json").is_file()]
    if len(runs) > 1 and finished:
        compare(finished, make_console())
    print(written)


if __name__ == "__main__":
    sys.exit(main())
