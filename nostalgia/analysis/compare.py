"""Puts finished runs side by side: one table of methods, and where the figures and reports are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nostalgia.analysis.aggregate import (
    COLUMNS,
    MethodRow,
    Value,
    by_method,
    doubts,
    read_finished,
    same_tasks,
)
from nostalgia.analysis.report.tables import cost_text
from nostalgia.errors import UsageError
from nostalgia.logging.console import METRIC_MEANINGS, METRIC_TITLES

if TYPE_CHECKING:
    from nostalgia.analysis.drawing import Drawn

HEADERS = {
    "acc": "acc",
    "class_incremental_acc": "c-inc",
    "bwt": "bwt",
    "forgetting": "forget",
    "learning_accuracy": "learn",
    "fwt": "fwt",
}
COSTS = {"seconds": "s", "memory_bytes": "MB", "extra_seconds": "extra"}


def compare(paths: Sequence[Path], console: Console) -> list[MethodRow]:
    """Print the comparison of the runs in ``paths``; raises NotFoundError for a folder without results."""
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


def draw_side_by_side(paths: Sequence[Path], folder: Path) -> Drawn:
    """Draw the comparison of the runs in ``paths`` into ``folder``.

    Raises NotFoundError for a folder without results; UsageError for runs of other tasks, or where nothing can be written.
    """
    from nostalgia.analysis.drawing import draw_comparison  # takes a second to import, for which a table need not wait

    runs = read_finished(paths)
    if not same_tasks(runs):
        raise UsageError("figures of several runs: their tasks are not the same; give runs of one sequence")
    try:
        return draw_comparison({row.method: row.runs for row in by_method(runs)}, folder)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be written ({error.strerror})") from None
