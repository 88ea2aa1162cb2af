"""Writes the report of a run, or of several side by side, as one HTML file.

python -m nostalgia.report RUN_DIR [RUN_DIR ...] [--out FILE] [--figure module:function]

Exit codes: 0 done, 2 wrong usage or a file that cannot be written, 3 no such run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nostalgia.errors import NostalgiaError
from nostalgia.reporting.report import write_report

EXAMPLES = """examples:
  python -m nostalgia.report runs/demo/latest                     writes runs/demo/latest/results/report.html
  python -m nostalgia.report runs/demo/2* --out comparison.html   methods and seeds side by side, tables to paste
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        print(write_report(options.runs, options.out, own_figures=options.figure))
    except NostalgiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nostalgia.report",
        description="Write the report of a run, finished or not; several runs are put side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN_DIR/results/report.html, ./report.html for several runs"
    )
    parser.add_argument(
        "--figure",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a figure of your own in the report of one run: a function of its folder (docs/runs.md); may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
