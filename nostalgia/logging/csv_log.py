"""CSV logs that survive interruption: rows are whole, a torn last one is mended, a resumed run appends."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nostalgia.errors import NotFoundError
from nostalgia.utils.files import read_text, write_atomic

METRICS_COLUMNS = (
    "step",
    "task",
    "epoch",
    "split",
    "loss",
    "accuracy",
    "class_incremental_accuracy",
    "lr",
    "grad_norm",
    "projected_fraction",
    "leak",
    "images_per_s",
)
MEMORY_COLUMNS = ("time", "step", "rank", "gpu_mem_mb", "cpu_mem_mb")
TEXT_COLUMNS = ("task", "split")
Record = dict[str, Any]


class CsvLog:
    """Appends rows to a CSV file, each flushed, after the rows a former part of the run left there.

    ``columns`` are written as the header of a new file; a torn last line is cut off. Raises OSError where the
    file cannot be written, ValueError for a column it does not have.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._mend()
        self._file = path.open("a", newline="", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; columns not in ``row``, or None there, stay empty."""
        unknown = set(row) - set(self.columns)
        if unknown:
            raise ValueError(f"{self.path.name} has no column {', '.join(sorted(unknown))}")
        self._file.write(_line([_cell(row.get(name)) for name in self.columns]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _mend(self) -> None:
        header = _line(self.columns)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            write_atomic(self.path, header)
        elif not whole.startswith(header):
            raise ValueError(f"{self.path} has other columns ({whole.splitlines()[0][:80]}); move it away")
        elif whole != text:
            write_atomic(self.path, whole)


def read_log(path: Path) -> list[Record]:
    """Rows of a CSV log, numbers as floats, empty cells as None, columns as they are in the file.

    Serves older logs with fewer columns. A torn last line is left out; NotFoundError names any other damaged
    line.
    """
    text = read_text(path)
    lines = csv_lines(path, text[: text.rfind("\n") + 1])
    if not lines:
        raise NotFoundError(f"{path}: empty, expected a header line")
    header = [name.strip() for name in lines[0]]
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise NotFoundError(f"{path}, line {number}: {len(line)} values for {len(header)} columns")
        try:
            rows.append({name: _value(name, cell) for name, cell in zip(header, line, strict=True)})
        except ValueError:
            shown = " ".join(", ".join(line).split())[:80]
            raise NotFoundError(f"{path}, line {number}: not a number among {shown}") from None
    return rows


def csv_lines(path: Path, text: str) -> list[list[str]]:
    """The cells of ``text``; raises NotFoundError, naming ``path``, where it is no CSV."""
    try:
        return list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise NotFoundError(f"{path}: not a CSV file ({error})") from None


def column(rows: Sequence[Record], name: str, where: Callable[[Record], bool] = lambda row: True) -> list[float]:
    """The known, finite values of a column in the rows that satisfy ``where``."""
    values = [row.get(name) for row in rows if where(row)]
    return [value for value in values if value is not None and math.isfinite(value)]


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    return cell if name in TEXT_COLUMNS else float(cell)
