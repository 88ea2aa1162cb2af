"""The README of an exported model: what it was trained on, how well it does, how to open it again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Characters that mean something to Markdown or HTML within a line or a table cell.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~&$:])")

OWN = "Each task has its own head: which task an image belongs to must be known."
SHARED = (
    "Tasks with the same classes below share one head of all of them, and are told apart by its outputs; accuracies are over "
    "all classes of the head."
)


@dataclass(frozen=True)
class TaskCard:
    """What the card says of one task; accuracies are fractions."""

    name: str  # also the name of its head
    classes: Sequence[str]
    accuracy: float | None  # at the end of the run, on the task's validation images
    learning_accuracy: float | None = None  # just after the task was trained
    transform: Sequence[str] = ()  # what was done to all of its images


def escape(text: str) -> str:
    """``text`` as Markdown that shows exactly it, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def code(text: str) -> str:
    """``text`` as a fenced block; the fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def model_card(
    *,
    title: str,
    source: str,
    tasks: Sequence[TaskCard],
    command: str,
    method: str,
    usage: str,
    files: Mapping[str, str],
    normalisation: str,
    shared_heads: bool = False,
    tags: Sequence[str] = (),
    library: str | None = None,
) -> str:
    """The card as Markdown with the YAML head that model hubs read."""
    changed = ", changed as the last column says (nostalgia.data.transforms)" if _transformed(tasks) else ""
    parts = [
        _hub_head(tags, library),
        f"# {escape(title)}",
        f"{escape(source)}, fine-tuned on {len(tasks)} tasks in turn with the method {escape(method)}. "
        + (SHARED if shared_heads else OWN),
        _table(tasks),
        f"Accuracies are fractions of the task's validation images{changed}.",
        "## Classes",
        "In the order of each head's outputs:",
        "\n".join(f"- **{escape(task.name)}**: {', '.join(_class(name) for name in task.classes)}" for task in tasks),
        "## Files",
        "\n".join(f"- `{name}`: {text}" for name, text in files.items()),
        "## Use",
        normalisation,
        usage,
        "## Training",
        code(command),
    ]
    return "\n\n".join(parts) + "\n"


def _hub_head(tags: Sequence[str], library: str | None) -> str:
    lines = [f"library_name: {library}"] if library else []
    lines += ["pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in ("continual-learning", "nostalgia", *tags)]
    return "\n".join(["---", *lines, "---"])


def _table(tasks: Sequence[TaskCard]) -> str:
    columns = ["task", "classes", "accuracy when learned", "accuracy at the end"]
    rows = [
        [escape(task.name), str(len(task.classes)), _fraction(task.learning_accuracy), _fraction(task.accuracy)]
        for task in tasks
    ]
    if _transformed(tasks):
        columns.append("images")
        rows = [[*row, escape(", ".join(task.transform))] for row, task in zip(rows, tasks, strict=True)]
    return "\n".join([_row(columns), "|---" * len(columns) + "|", *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _transformed(tasks: Sequence[TaskCard]) -> bool:
    return any(task.transform for task in tasks)


def _class(name: str) -> str:
    """A class in a list with commas."""
    return f'"{escape(name)}"' if "," in name else escape(name)


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
