"""Shows a model's accuracy class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nostalgia.evaluation.per_class import ClassScores
from nostalgia.logging.console import number

SHOWN = 40  # classes, of a longer list the lowest


@dataclass(frozen=True)
class Measured:
    """One task as measured now, and as the run has it (None where that cannot be compared)."""

    task: str
    scores: ClassScores
    run_accuracy: float | None = None

    def to_json(self) -> dict[str, object]:
        scores = self.scores
        return {
            "task": self.task,
            "accuracy": scores.accuracy,
            "run_accuracy": self.run_accuracy,
            "loss": scores.loss,
            "correct": sum(scores.correct),
            "num_samples": scores.num_samples,
            "classes": [
                {"class": name, "num_samples": scores.counts[i], "correct": scores.correct[i], "accuracy": value}
                for i, name in enumerate(scores.classes)
                for value in [scores.of_class(i)]
            ],
        }


def print_measured(console: Console, measured: Sequence[Measured]) -> None:
    """The classes of each task, then the tasks side by side with the run's own numbers."""
    for one in measured:
        console.print(_class_table(one))
        console.print()
    table = _table("task", ("images", "correct", "accuracy", "in the run"))
    for one in measured:
        scores = one.scores
        cells = (str(scores.num_samples), str(sum(scores.correct)), number(scores.accuracy), number(one.run_accuracy))
        table.add_row(Text(one.task), *cells)
    console.print(table)


def _class_table(one: Measured) -> Table:
    scores = one.scores
    rows = [i for i, count in enumerate(scores.counts) if count]
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda i: (scores.correct[i] / scores.counts[i], i))[:SHOWN]
        title = f"{one.task}: the {SHOWN} classes of {sum(map(bool, scores.counts))} with the lowest accuracy"
    else:
        title = one.task
    table = _table("class", ("images", "correct", "accuracy"), title)
    for i in rows:
        table.add_row(
            Text(scores.classes[i]), f"{scores.counts[i]}", f"{scores.correct[i]}", number(scores.of_class(i))
        )
    return table


def _table(first: str, others: Sequence[str], title: str | None = None) -> Table:
    words = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), "show_edge": False}
    table = Table(title=None if title is None else Text(title, style="bold"), title_justify="left", **words)  # type: ignore[arg-type]
    table.add_column(first, overflow="ellipsis", no_wrap=True, max_width=32)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
