"""Puts finished runs side by side: one table of methods, and where the figures and reports are.

python -m nostalgia.reporting.compare RUN_DIR RUN_DIR ... [--figures FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nostalgia.errors import NostalgiaError, UsageError
from nostalgia.reporting.aggregate import (
    COLUMNS,
    MethodRow,
    Value,
    by_method,
    doubts,
    read_finished,
    same_tasks,
)
from nostalgia.reporting.console import METRIC_MEANINGS, METRIC_TITLES
from nostalgia.reporting.report.tables import cost_text
from nostalgia.reporting.streams import make_console

HEADERS = {
    "acc": "acc",
    "class_incremental_acc": "c-inc",
    "bwt": "bwt",
    "forgetting": "forget",
    "learning_accuracy": "learn",
    "fwt": "fwt",
}
COSTS = {"seconds": "s", "memory_bytes": "MB", "extra_seconds": "extra"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        compare(options.runs, make_console(), options.figures)
    except NostalgiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compare(paths: Sequence[Path], console: Console, figures: Path | None = None) -> list[MethodRow]:
    """Print the comparison of the runs in ``paths``; with ``figures``, draw it into that folder too.

    Raises NotFoundError for a folder without results, UsageError where the figures cannot be written.
    """
    runs = read_finished(paths)
    rows = by_method(runs)
    console.print(comparison_table(rows))
    for name, title in HEADERS.items():
        console.print(f"{title:<7} {METRIC_TITLES[name]}: {METRIC_MEANINGS[name]}", style="dim", soft_wrap=True)
    console.print(
        "MB, extra: what the method keeps between tasks, and the seconds it added", style="dim", soft_wrap=True
    )
    if any(len(row.seeds) > 1 for row in rows):
        console.print("±       standard deviation over seeds (n - 1)", style="dim")
    console.print()
    for doubt in doubts(rows):
        console.print(f"note: {doubt}", highlight=False, markup=False, soft_wrap=True)
    for run in runs:
        for name in ("report.html", "figures"):
            path = run.path / "results" / name
            if path.exists():
                console.print(f"{name:<12} {shown(path)}", highlight=False, markup=False, soft_wrap=True)
    if figures is not None and same_tasks(runs):
        _draw(rows, figures, console)
    return rows


def comparison_table(rows: Sequence[MethodRow]) -> Table:
    """Methods down, measures across; one line a method at 80 columns, spread in a second line of the cell."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("method", overflow="fold")
    table.add_column("seeds", justify="right", overflow="fold", max_width=9)
    for name in COLUMNS:
        table.add_column({**HEADERS, **COSTS}[name], justify="right", no_wrap=True)
    for row in rows:
        cells = [*(_cell(row.values[name]) for name in HEADERS), *(cost_text(row, name) for name in COSTS)]
        table.add_row(Text(row.method), ", ".join(map(str, row.seeds)), *cells)
    return table


def shown(path: Path) -> Path:
    """``path`` as seen from the working folder where it lies under it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _cell(value: Value | None) -> str:
    return "-" if value is None else value.text(plus_minus="\n±")


def _draw(rows: Sequence[MethodRow], folder: Path, console: Console) -> None:
    # Drawing takes a second to import; a table alone should not wait for it.
    from nostalgia.reporting.drawing import draw_comparison

    try:
        drawn = draw_comparison({row.method: row.runs for row in rows}, folder)
    except OSError as error:
        raise UsageError(f"--figures {folder}: cannot be written ({error.strerror})") from None
    for name, path in drawn.made.items():
        console.print(f"{name:<25} {shown(path)}", highlight=False, markup=False, soft_wrap=True)
    for name, reason in drawn.skipped.items():
        console.print(f"{name:<25} not made: {reason}", highlight=False, markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nostalgia.reporting.compare",
        description="Put finished runs side by side; runs of the same method are seeds of one row.",
        epilog="example: python -m nostalgia.reporting.compare runs/demo/latest runs/demo-finetune/latest",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the comparison into this folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
