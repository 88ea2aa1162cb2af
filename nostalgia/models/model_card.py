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
    head = [
        "---",
        *([f"library_name: {library}"] if library else []),
        "pipeline_tag: image-classification",
        "tags:",
    ]
    head += [*(f"- {tag}" for tag in ("continual-learning", "nostalgia", *tags)), "---"]
    shifted = any(task.transform for task in tasks)
    rows = [
        f"| {escape(task.name)} | {len(task.classes)} | {_fraction(task.learning_accuracy)} | "
        f"{_fraction(task.accuracy)} |" + (f" {escape(', '.join(task.transform))} |" if shifted else "")
        for task in tasks
    ]
    classes = [
        f"- **{escape(task.name)}**: "
        + ", ".join(f'"{escape(name)}"' if "," in name else escape(name) for name in task.classes)
        for task in tasks
    ]
    return "\n".join(
        [
            *head,
            "",
            f"# {escape(title)}",
            "",
            f"{escape(source)}, fine-tuned on {len(tasks)} tasks in turn with the method {escape(method)}. "
            + (SHARED if shared_heads else OWN),
            "",
            "| task | classes | accuracy when learned | accuracy at the end |" + (" images |" if shifted else ""),
            "|---|---|---|---|" + ("---|" if shifted else ""),
            *rows,
            "",
            "Accuracies are fractions of the task's validation images"
            + (", changed as the last column says (nostalgia.data.transforms)." if shifted else "."),
            "",
            "## Classes",
            "",
            "In the order of each head's outputs:",
            "",
            *classes,
            "",
            "## Files",
            "",
            *(f"- `{name}`: {text}" for name, text in files.items()),
            "",
            "## Use",
            "",
            normalisation,
            "",
            usage,
            "",
            "## Training",
            "",
            code(command),
            "",
        ]
    )


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
