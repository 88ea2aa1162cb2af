"""What a run prints: the panel it starts with, a block for each finished task, the tables it ends with.

Functions take a rich console and plain values. Everything reads at 80 columns and without colour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from nostalgia.evaluation import transfer
from nostalgia.logging.progress import duration
from nostalgia.logging.results import METRICS, RunResults
from nostalgia.utils.sizes import num_bytes

METRIC_TITLES = {
    "acc": "average accuracy",
    "class_incremental_acc": "class-incremental",
    "bwt": "backward transfer",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
    "fwt": "forward transfer",
}
METRIC_MEANINGS = {
    "acc": "mean accuracy over all tasks at the end",
    "class_incremental_acc": "the same with the task unknown: arg-max over the heads of all tasks",
    "bwt": "mean change of a task's accuracy since it was learned",
    "forgetting": "mean drop of a task's accuracy from its best before the last task",
    "learning_accuracy": "mean accuracy of each task right after it was learned",
    "fwt": "accuracy before training with a fitted head, minus that of the first backbone",
}


@dataclass(frozen=True)
class TaskInfo:
    """A task as the start panel shows it."""

    name: str
    num_classes: int
    num_train: int
    num_val: int
    source: str  # where the data is from


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run as the start panel shows it. Counts are of numbers, memory in bytes over all ranks."""

    method: str
    seed: int
    tasks: Sequence[TaskInfo]
    model: str
    total_parameters: int
    trainable_parameters: int  # of the backbone; heads come on top
    scope_parameters: int
    scope: str  # what methods protect: "backbone" or "lora-only"
    devices: str  # "2 x cpu", "8 x NVIDIA H100"
    strategy: str  # single, ddp, fsdp2
    precision: str
    per_device_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    epochs: Sequence[int]  # of each task
    run_dir: Path
    suite: str | None = None
    memory_bytes: int = 0  # that the method remembers between tasks, at most, over all ranks
    memory: str = ""  # in words
    merges_adapters: bool = False  # after each task but the last


def start_panel(info: RunInfo) -> Panel:
    """Suite, tasks, model, devices, batch and basis memory of a run that starts."""
    grid = _pairs()
    title = f"nostalgia: {info.suite}" if info.suite else "nostalgia"
    grid.add_row("method", f"{info.method}, seed {info.seed}")
    grid.add_row("model", Text(f"{info.model}, {count(info.total_parameters)} parameters"))
    grid.add_row("", _parameter_text(info))
    if info.merges_adapters:
        grid.add_row("", "adapters are merged and begin anew with each task")
    grid.add_row("devices", f"{info.devices}, {info.strategy}, precision {info.precision}")
    grid.add_row("batch", _batch_text(info))
    if info.memory_bytes:
        grid.add_row("memory", f"{info.memory}: {num_bytes(info.memory_bytes)} over all ranks")
    grid.add_row("epochs", _epochs_text(info.epochs))
    grid.add_row("folder", Text(str(info.run_dir), overflow="fold"))
    outer = Table.grid(expand=False)
    outer.add_row(grid)
    outer.add_row("")
    outer.add_row(_task_table(info.tasks))
    return Panel(outer, title=title, title_align="left", expand=False, box=box.ROUNDED)


def print_config(console: Console, config: Mapping[str, Any], *, quiet: bool = False, path: Path | None = None) -> None:
    """The composed configuration; folded to the path of its file where ``quiet``."""
    where = f" ({path})" if path else ""
    if quiet:
        console.print(f"config{where}", highlight=False, markup=False, soft_wrap=True)
        return
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=70)
    body = Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default", word_wrap=True)
    console.print(Panel(body, title=Text(f"config{where}"), title_align="left", expand=False, box=box.ROUNDED))


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """What is known when a task is finished; the curvature fields are None where none was computed."""

    index: int  # from 1
    total: int
    tasks: Sequence[str]  # names, of all tasks
    matrix: transfer.Matrix  # rows so far
    seconds: float
    eigenvalues: Sequence[float] | None = None
    converged: int | None = None
    products: int | None = None
    leak: float | None = None
    memory_columns: int | None = None


def task_row(outcome: TaskOutcome) -> Panel:
    """Accuracies on the tasks seen, forgetting so far, eigenvalues and leak at the end of a task."""
    rows = transfer.finished_rows(outcome.matrix)
    grid = _pairs()
    grid.add_row("accuracy", accuracy_text(outcome.tasks, rows[-1] if rows else []))
    average, lost = transfer.acc(rows), transfer.forgetting(rows)
    grid.add_row("so far", f"average {number(average)}, forgetting {number(lost)}")
    if outcome.eigenvalues:
        values, converged = outcome.eigenvalues, outcome.converged
        found = "" if converged in (None, len(values)) else f", {converged} of {len(values)} converged"
        spent = "" if outcome.products is None else f", {outcome.products} products"
        text = f"top eigenvalue {values[0]:.4g}, number {len(values)}: {values[-1]:.4g}{found}{spent}"
        grid.add_row("curvature", text)
    if outcome.memory_columns is not None:
        grid.add_row("memory", f"{outcome.memory_columns} directions")
    if outcome.leak is not None:
        grid.add_row("leak", f"{outcome.leak:.1e} of the displacement lies in the memory's span")
    name = outcome.tasks[outcome.index - 1]
    title = f"task {outcome.index}/{outcome.total} {name}: {duration(outcome.seconds)}"
    return Panel(grid, title=title, title_align="left", expand=False, box=box.ROUNDED)


def print_final(console: Console, results: RunResults, paths: Mapping[str, Path] | None = None) -> None:
    """The accuracy matrix, the measures with their meaning, and where the files are."""
    console.print("Accuracy on each task (column) after training a task (row)", style="bold")
    for table in matrix_tables(results.tasks, results.accuracy_matrix, console.width):
        console.print(table)
        console.print()
    console.print(metrics_table(results.metrics()))
    console.print()
    width = max((len(name) for name in paths or {}), default=0)
    for name, path in (paths or {}).items():
        console.print(f"{name:<{width}}  {path}", highlight=False, markup=False, soft_wrap=True)


def matrix_tables(tasks: Sequence[str], matrix: transfer.Matrix, width: int = 80) -> list[Table]:
    """The accuracy matrix; columns that do not fit ``width`` go to further tables, without the empty rows."""
    names = [Text(f"{t}  {name}", overflow="ellipsis", no_wrap=True) for t, name in enumerate(tasks, start=1)]
    room = max(10, min(max(len(name.plain) for name in names), width // 3))
    per_table = max(1, (width - room) // 7)
    tables = []
    for start in range(0, len(tasks), per_table):
        columns = range(start, min(start + per_table, len(tasks)))
        table = _table()
        table.add_column("after task", width=room, no_wrap=True)
        for u in columns:
            table.add_column(str(u + 1), justify="right", width=5)
        for t, row in enumerate(matrix[start:], start=start):
            values = [row[u] if u < len(row) else None for u in columns]
            cells = ["" if u > t and v is None else number(v) for u, v in zip(columns, values, strict=True)]
            table.add_row(names[t], *cells)
        tables.append(table)
    return tables


def metrics_table(metrics: Mapping[str, float | None]) -> Table:
    """The measures, each with what it means."""
    table = _table()
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for name in METRICS:
        table.add_row(METRIC_TITLES[name], number(metrics.get(name)), METRIC_MEANINGS[name])
    return table


def accuracy_text(tasks: Sequence[str], row: Sequence[float | None]) -> str:
    """``task1_digits 0.950, task2_mnist 0.910``, by number only where there are many tasks."""
    short = len(row) > 6
    pairs = zip(range(1, len(row) + 1), tasks, row, strict=False)
    return ", ".join(f"{t if short else name} {number(value)}" for t, name, value in pairs) or "none yet"


def number(value: float | None) -> str:
    """Three decimals; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3f}"


def count(value: int) -> str:
    """``454k``, ``85.8M``."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.0f}{name}" if scaled >= 100 else f"{scaled:.3g}{name}"
    return str(value)


def plain(renderable: RenderableType, width: int = 80) -> str:
    """What ``renderable`` looks like without colour, for logs and tests."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    return stream.getvalue()


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)


def _pairs() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _task_table(tasks: Sequence[TaskInfo]) -> Table:
    table = _table()
    table.add_column("task", overflow="ellipsis", no_wrap=True, max_width=26)
    for name in ("classes", "train", "val"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("source", overflow="fold", max_width=30)
    for task in tasks:
        sizes = (f"{task.num_classes}", f"{task.num_train:,}", f"{task.num_val:,}")
        table.add_row(Text(task.name), *sizes, Text(task.source))
    return table


def _parameter_text(info: RunInfo) -> str:
    trained = f"{count(info.trainable_parameters)} trained"
    return f"{trained}, {count(info.scope_parameters)} in the method's scope ({info.scope})"


def _batch_text(info: RunInfo) -> str:
    accumulated = f" x {info.accumulation_steps} accumulated" if info.accumulation_steps > 1 else ""
    return f"{info.global_batch_size} global: {info.per_device_batch_size} per device{accumulated}"


def _epochs_text(epochs: Sequence[int]) -> str:
    if len(set(epochs)) <= 1:
        return f"{epochs[0] if epochs else 0} a task"
    return ", ".join(map(str, epochs))
