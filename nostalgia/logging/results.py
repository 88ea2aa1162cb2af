"""The numbers a run ends with, and their files: results.json, per_task_acc.json, accuracy_matrix.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nostalgia.errors import NotFoundError
from nostalgia.evaluation import transfer
from nostalgia.logging.csv_log import csv_lines
from nostalgia.utils.files import is_number, read_json, read_text, write_atomic, write_json

METRICS = ("acc", "class_incremental_acc", "bwt", "forgetting", "learning_accuracy", "fwt")
COSTS = ("memory_bytes", "extra_seconds")
RESULTS, PER_TASK, MATRIX = "results.json", "per_task_acc.json", "accuracy_matrix.csv"
FORGETTING = "forgetting_prediction.json"


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Results of a run. Accuracies are fractions; the measures are defined in `evaluation.transfer`."""

    tasks: list[str]  # names, in order
    classes: list[list[str]]  # class names of each task
    accuracy_matrix: list[list[float | None]]  # [t][u]: after training task t, on task u; (T, T)
    acc: float | None
    bwt: float | None
    forgetting: float | None
    learning_accuracy: float | None
    fwt: float | None
    method: str
    seed: int
    world_size: int
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)  # of the packages the numbers depend on
    class_incremental: dict[str, Any] | None = None  # accuracy_matrix, acc, bwt, forgetting, learning_accuracy
    memory_bytes: int | None = None  # what the method remembers between tasks, network excluded, over all ranks
    overhead_seconds: dict[str, float] | None = None  # that the method added: training, between_tasks
    before_accuracies: list[float | None] | None = None  # what fwt is computed from, (T,)
    baseline_accuracies: list[float | None] | None = None
    details: dict[str, Any] = field(default_factory=dict)  # suite, model, seconds of each task, ...

    @classmethod
    def of(
        cls,
        *,
        tasks: Sequence[str],
        classes: Sequence[Sequence[str]],
        accuracy_matrix: transfer.Matrix,
        class_incremental_matrix: transfer.Matrix | None = None,
        before_accuracies: transfer.Row | None = None,
        baseline_accuracies: transfer.Row | None = None,
        **rest: Any,
    ) -> RunResults:
        """Results with the measures computed from the accuracies; ``rest``: the remaining fields by name."""
        size = len(tasks)
        matrix = _square(accuracy_matrix, size)
        unknown = None
        if class_incremental_matrix is not None:
            unknown = {"accuracy_matrix": _square(class_incremental_matrix, size)}
            unknown |= {k: v for k, v in measures(unknown["accuracy_matrix"]).items() if k != "fwt"}
        numbers = measures(matrix, before_accuracies, baseline_accuracies)
        return cls(
            tasks=list(tasks),
            classes=[list(names) for names in classes],
            accuracy_matrix=matrix,
            **numbers,
            class_incremental=unknown,
            before_accuracies=None if before_accuracies is None else list(before_accuracies),
            baseline_accuracies=None if baseline_accuracies is None else list(baseline_accuracies),
            **rest,
        )

    @property
    def class_incremental_acc(self) -> float | None:
        """Average accuracy with the task unknown."""
        return None if self.class_incremental is None else self.class_incremental.get("acc")

    @property
    def extra_seconds(self) -> float | None:
        """What the method added, while training and between tasks."""
        return None if self.overhead_seconds is None else math.fsum(self.overhead_seconds.values())

    def metrics(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in METRICS}

    def final_accuracies(self) -> list[float | None]:
        """Accuracy on each task at the end of the run (T,)."""
        rows = transfer.finished_rows(self.accuracy_matrix)
        last = rows[-1] if rows else []
        return [*last, *[None] * (len(self.tasks) - len(last))]


def _square(matrix: transfer.Matrix, size: int) -> list[list[float | None]]:
    """Rows up to the diagonal, or fewer than ``size``, filled up with None."""
    rows = [[*row, *[None] * (size - len(row))] for row in matrix]
    return rows + [[None] * size for _ in range(size - len(rows))]


def measures(
    matrix: transfer.Matrix, before: transfer.Row | None = None, baseline: transfer.Row | None = None
) -> dict[str, Any]:
    """The five measures by name; definitions in `evaluation.transfer`."""
    return {
        "acc": transfer.acc(matrix),
        "bwt": transfer.bwt(matrix),
        "forgetting": transfer.forgetting(matrix),
        "learning_accuracy": transfer.learning_accuracy(matrix),
        "fwt": transfer.fwt(before, baseline),
    }


def write_results(folder: Path, results: RunResults) -> dict[str, Path]:
    """Write the three files into ``folder``, results.json last; returns their paths by name."""
    paths = {name: folder / name for name in (RESULTS, PER_TASK, MATRIX)}
    write_atomic(paths[MATRIX], matrix_csv(results.tasks, results.accuracy_matrix))
    write_json(paths[PER_TASK], results.final_accuracies())
    write_json(paths[RESULTS], {f.name: getattr(results, f.name) for f in fields(results)})
    return paths


def read_results(path: Path) -> RunResults:
    """Read results.json (``path`` is it, or its folder); NotFoundError where it is missing or damaged."""
    file = path / RESULTS if path.is_dir() else path
    data = read_json(file)
    if not isinstance(data, dict):
        raise NotFoundError(f"{file}: expected a mapping, found {type(data).__name__}")
    known = {f.name: data[f.name] for f in fields(RunResults) if f.name in data}
    missing = [name for name in ("tasks", "accuracy_matrix", "method", "seed") if name not in known]
    if missing:
        raise NotFoundError(f"{file}: {', '.join(missing)} missing; is this a results.json of this program?")
    tasks = _checked_tasks(known["tasks"], file)
    matrix = _checked_matrix(known["accuracy_matrix"], len(tasks), file)
    rows = {name: _checked_row(known.get(name), len(tasks), file, name) for name in _ROWS}
    numbers = {name: _checked_number(known[name], file, name) for name in METRICS if name in known}
    for name, (kind, good) in _FIELDS.items():
        if name in known and not good(known[name]):
            raise NotFoundError(f"{file}: {name} must be {kind}, found {_short(known[name])}")
    defaults = {"classes": [[] for _ in tasks], "world_size": 1, "seconds": 0.0}
    return RunResults(**{**defaults, **measures(matrix, **_measure_words(rows)), **known, **numbers, **rows})


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_whole(value: Any) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 0


def _is_measured(value: Any) -> bool:
    numbers = [v for k, v in value.items() if k != "accuracy_matrix"] if isinstance(value, dict) else [""]
    return all(number is None or is_number(number) for number in numbers)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "classes": ("a list of lists of names", lambda v: isinstance(v, list) and all(map(_is_names, v))),
    "method": ("a name", lambda v: isinstance(v, str)),
    "seed": ("a whole number", _is_whole),
    "world_size": ("a whole number", _is_whole),
    "seconds": ("a number", is_number),
    "versions": ("names with versions", lambda v: isinstance(v, dict) and _is_names(list(v.values()))),
    "details": ("a mapping", lambda v: isinstance(v, dict)),
    "class_incremental": ("a mapping of numbers and a matrix, or null", lambda v: v is None or _is_measured(v)),
    "memory_bytes": ("a whole number or null", lambda v: v is None or _is_whole(v)),
    "overhead_seconds": (
        "a mapping of numbers or null",
        lambda v: v is None or (isinstance(v, dict) and all(map(is_number, v.values()))),
    ),
}
_ROWS = ("before_accuracies", "baseline_accuracies")


def matrix_csv(tasks: Sequence[str], matrix: transfer.Matrix) -> str:
    """The matrix as CSV: a header of task names, a row for each trained task, nothing where not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after_training", *tasks])
    for name, row in zip(tasks, matrix, strict=True):
        writer.writerow([name, *("" if value is None else repr(value) for value in row)])
    return text.getvalue()


def read_matrix_csv(path: Path) -> tuple[list[str], list[list[float | None]]]:
    """Task names and matrix of `matrix_csv`; raises NotFoundError naming the line that is damaged."""
    lines = csv_lines(path, read_text(path))
    if not lines or len(lines[0]) < 2:
        raise NotFoundError(f"{path}: no header of task names in the first line")
    tasks, matrix = lines[0][1:], []
    for number, line in enumerate(lines[1:], start=2):
        try:
            matrix.append([None if cell == "" else float(cell) for cell in line[1:]])
        except ValueError:
            raise NotFoundError(f"{path}, line {number}: not a number among {line[1:]}") from None
    return tasks, _checked_matrix(matrix, len(tasks), path)


def _measure_words(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {"before": rows["before_accuracies"], "baseline": rows["baseline_accuracies"]}


def _checked_tasks(tasks: Any, file: Path) -> list[str]:
    if not isinstance(tasks, list) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise NotFoundError(f"{file}: tasks must be a list of names, found {_short(tasks)}")
    return tasks


def _checked_matrix(matrix: Any, size: int, file: Path) -> list[list[float | None]]:
    shape = f"{size} x {size} for {size} task{'s' if size > 1 else ''}"
    if not isinstance(matrix, list) or len(matrix) != size:
        found = f"{len(matrix)} rows" if isinstance(matrix, list) else _short(matrix)
        raise NotFoundError(f"{file}: the accuracy matrix must be {shape}, found {found}")
    for t, row in enumerate(matrix, start=1):
        _checked_row(row, size, file, f"accuracy_matrix row {t}", required=True)
    return matrix


def _checked_row(row: Any, size: int, file: Path, name: str, required: bool = False) -> list[float | None] | None:
    if row is None and not required:
        return None
    if not isinstance(row, list) or len(row) != size:
        raise NotFoundError(f"{file}: {name} must be a list of {size} numbers or nulls, found {_short(row)}")
    for value in row:
        if value is not None and not (is_number(value) and 0 <= value <= 1):
            raise NotFoundError(f"{file}: {name} holds {_short(value)}, an accuracy is a fraction between 0 and 1")
    return row


def _checked_number(value: Any, file: Path, name: str) -> float | None:
    if value is not None and not is_number(value):
        raise NotFoundError(f"{file}: {name} must be a number or null, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
