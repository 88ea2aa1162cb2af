"""Reads a run folder, whatever of it is there: finished, under way, broken off, or of an older version."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from nostalgia.errors import NotFoundError
from nostalgia.evaluation import transfer
from nostalgia.logging.csv_log import Record, read_log
from nostalgia.logging.results import FORGETTING, MATRIX, PER_TASK, RESULTS, RunResults, read_matrix_csv, read_results
from nostalgia.utils.files import is_number, read_json
from nostalgia.utils.yaml_files import read_yaml

DATA = "data.json"
FORGETTING_NUMBERS = ("measured", "predicted", "linear", "inside", "outside", "bound", "displacement")

T = TypeVar("T")
D = TypeVar("D")


@dataclass
class TaskCurvature:
    """curvature/task<i>.json of a finished task."""

    index: int  # from 1
    task: str
    eigenvalues: list[float]  # (k,), decreasing
    residuals: list[float]  # (k,), |H q - lambda q|
    converged: list[bool]  # (k,)
    memory_eigenvalues: list[float]  # (m,) of the memory after this task
    principal_angles: dict[str, list[float]]  # earlier task -> radians, increasing
    raw: dict[str, Any]  # the whole file: products, seconds, tol, trace, density, ...


@dataclass
class RunFolder:
    """What could be read of a run; ``problems`` says in one line each what could not."""

    path: Path
    tasks: list[str] = field(default_factory=list)
    matrix: list[list[float | None]] = field(default_factory=list)  # (T, T), rows of unfinished tasks all None
    results: RunResults | None = None
    metrics: list[Record] = field(default_factory=list)
    memory: list[Record] = field(default_factory=list)
    curvature: list[TaskCurvature] = field(default_factory=list)
    forgetting: dict[str, list[Record]] = field(
        default_factory=lambda: {"tasks": [], "rows": []}
    )  # results/forgetting_prediction.json
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # data.json: the images of each task
    alias: str = ""  # what tells its method from another of the same name: see `tell_apart`
    problems: dict[str, str] = field(default_factory=dict)  # name of the file -> why it could not be read

    @property
    def configured_method(self) -> str:
        """``method.name`` of its configuration: a built-in method's, or ``module:Class``."""
        group = self.config.get("method")
        return str(group.get("name", "")) if isinstance(group, dict) else ""

    @property
    def method(self) -> str:
        """The method's name, empty where no file tells it."""
        return self.results.method if self.results else self.configured_method

    @property
    def label(self) -> str:
        return self.alias or self.method or self.path.name


def tell_apart(runs: Iterable[RunFolder]) -> None:
    """Name runs of methods that are called alike, such as two classes of the user's own, as they are configured."""
    named: dict[str, list[RunFolder]] = {}
    for run in runs:
        named.setdefault(run.method, []).append(run)
    for alike in named.values():
        if len({run.configured_method for run in alike}) > 1:
            for run in alike:
                run.alias = run.configured_method


def read_run(path: Path, *, log_csv: Path | None = None, mem_csv: Path | None = None) -> RunFolder:
    """Read the run folder ``path``; raises NotFoundError where there is none.

    ``log_csv`` and ``mem_csv`` stand in for its metrics.csv and memory.csv.
    """
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such run folder")
    run = RunFolder(path=path)
    run.config = _mapping(_attempt(run, path / "config.yaml", read_yaml, {}))
    if (path / DATA).exists():
        run.data = _mapping(_attempt(run, path / DATA, read_json, {}))
    run.metrics = _attempt(run, log_csv or path / "metrics.csv", read_log, [])
    run.memory = _attempt(run, mem_csv or path / "memory.csv", read_log, [])
    for file in sorted((path / "curvature").glob("task*.json"), key=_task_number):
        found = _attempt(run, file, read_curvature, None)
        if found is not None:
            run.curvature.append(found)
    _read_matrix(run)
    prediction = path / "results" / FORGETTING
    if prediction.exists():
        run.forgetting = _attempt(run, prediction, read_forgetting, run.forgetting)
    return run


def read_curvature(file: Path) -> TaskCurvature:
    """Read curvature/task<i>.json; raises NotFoundError where it is damaged or has no eigenvalues."""
    data = read_json(file)
    if not isinstance(data, dict) or not _numbers(data.get("eigenvalues")):
        raise NotFoundError(f"{file}: no list of eigenvalues")
    for key, good in OPTIONAL.items():
        if data.get(key) is not None and not good(data[key]):
            raise NotFoundError(f"{file}: {key} is damaged")
    values = data["eigenvalues"]
    index = _task_number(file)
    angles = data.get("principal_angles")
    angles = angles if isinstance(angles, dict) else {}
    named = {str(task): list(radians) for task, radians in angles.items() if _numbers(radians)}
    converged = data.get("converged")
    return TaskCurvature(
        index=index,
        task=data["task"] if isinstance(data.get("task"), str) else f"task{index}",
        eigenvalues=values,
        residuals=data["residuals"] if _numbers(data.get("residuals"), len(values)) else [],
        converged=converged if _booleans(converged, len(values)) else [True] * len(values),
        memory_eigenvalues=data["memory_eigenvalues"] if _numbers(data.get("memory_eigenvalues")) else [],
        principal_angles=named,
        raw=data,
    )


def read_forgetting(file: Path) -> dict[str, list[Record]]:
    """``tasks`` and ``rows`` of results/forgetting_prediction.json; NotFoundError where it is damaged."""
    data = read_json(file)
    found: dict[str, list[Record]] = {}
    for part, numbers in (("tasks", ()), ("rows", FORGETTING_NUMBERS)):
        items = data.get(part) if isinstance(data, dict) else None
        if not isinstance(items, list) or not all(_is_record(item, ("task",), numbers) for item in items):
            raise NotFoundError(f"{file}: {part} must be a list with task, {', '.join(numbers)} in each item")
        found[part] = items
    return found


def matrix_from_metrics(metrics: list[Record]) -> tuple[list[str], list[list[float | None]]]:
    """Names and matrix as far as a run came, from the ``eval`` rows of its metrics (a block a task)."""
    blocks: dict[float, dict[str, float]] = {}
    for row in metrics:
        accuracy = row.get("accuracy")
        if not is_number(accuracy) or not 0 <= accuracy <= 1 or row.get("step") is None:
            continue
        if row.get("split") == "eval" and row.get("task"):
            blocks.setdefault(row["step"], {})[row["task"]] = accuracy
    longest: dict[str, float] = max(blocks.values(), key=len, default={})
    tasks = list(longest)
    size = len(tasks)
    matrix: list[list[float | None]] = [[None] * size for _ in range(size)]
    for block in blocks.values():
        matrix[len(block) - 1] = [block.get(name) for name in tasks]
    return tasks, matrix


def _read_matrix(run: RunFolder) -> None:
    """The accuracy matrix from the best file there is: results, its CSV, the metrics, final accuracies."""
    folder = run.path / "results"
    run.results = _attempt(run, folder / RESULTS, read_results, None)
    if run.results is not None:
        run.tasks, run.matrix = run.results.tasks, run.results.accuracy_matrix
        return
    if (folder / MATRIX).exists():
        found = _attempt(run, folder / MATRIX, read_matrix_csv, None)
        run.tasks, run.matrix = found if found is not None else ([], [])
    if not run.tasks:
        run.tasks, run.matrix = matrix_from_metrics(run.metrics)
    if not run.tasks and (folder / PER_TASK).exists():
        final = _attempt(run, folder / PER_TASK, read_json, None)
        if isinstance(final, list) and _numbers(final):
            run.tasks = [f"task{u}" for u in range(1, len(final) + 1)]
            run.matrix = [[None] * len(final)] * (len(final) - 1)
            run.matrix.append(final)


def finished_tasks(run: RunFolder) -> int:
    """How many tasks the run has finished, as far as its matrix tells."""
    return len(transfer.finished_rows(run.matrix))


def _attempt(run: RunFolder, file: Path, read: Callable[[Path], T], default: D) -> T | D:
    try:
        return read(file)
    except NotFoundError as error:
        reason = f"{file} is not there" if not file.exists() else str(error)
        run.problems[file.name] = reason
        return default


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _is_record(item: Any, words: tuple[str, ...], numbers: tuple[str, ...]) -> bool:
    return (
        isinstance(item, dict)
        and all(isinstance(item.get(word), str) for word in words)
        and _numbers([item.get(number) for number in numbers], len(numbers) or None) is bool(numbers)
    )


def _numbers(values: Any, length: int | None = None) -> bool:
    """Whether ``values`` is a list (of ``length``, else not empty) of numbers."""
    if not isinstance(values, list) or len(values) != (len(values) if length is None else length) or not values:
        return False
    return all(map(is_number, values))


def _booleans(values: Any, length: int) -> TypeGuard[list[bool]]:
    return isinstance(values, list) and len(values) == length and all(isinstance(value, bool) for value in values)


def _is_density(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    grid = value.get("grid")
    return isinstance(grid, list) and _numbers(grid) and _numbers(value.get("density"), len(grid))


def _is_text(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _numbers_or_none(values: Any) -> bool:
    return values == [] or _numbers(values)


# What a task's file may hold besides its pairs, and what it must then be.
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("products", "seconds", "tol", "trace", "collectives", "bytes_moved"), is_number),
    **dict.fromkeys(("parameter_sizes", "importance", "memory_importance"), _numbers_or_none),
    "parameters": _is_text,
    "density": _is_density,
}


def _task_number(file: Path) -> int:
    found = re.search(r"\d+", file.stem)
    return int(found.group()) if found else 0
