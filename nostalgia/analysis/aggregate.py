"""Numbers of several runs together: runs of the same method and tasks are seeds of one row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nostalgia.analysis.run_folder import RunFolder, read_run, tell_apart
from nostalgia.analysis.settings import differences
from nostalgia.errors import NotFoundError
from nostalgia.logging.results import COSTS, METRICS

COLUMNS = (*METRICS, "seconds", *COSTS)
PLAN = ("nostalgia", "finetune", "joint")


@dataclass(frozen=True)
class Value:
    """Mean over ``count`` seeds, and the standard deviation with n - 1 (None for one seed)."""

    mean: float
    std: float | None
    count: int

    def text(self, digits: int = 3, plus_minus: str = " ± ") -> str:
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f"{plus_minus}{self.std:.{digits}f}")


@dataclass(frozen=True)
class MethodRow:
    """A method over its seeds; a column is None where one of the runs has no value."""

    method: str
    seeds: tuple[int, ...]
    values: dict[str, Value | None]  # by name in COLUMNS
    runs: tuple[RunFolder, ...]


def read_finished(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs in ``paths``; NotFoundError for a folder without results, a link and its target count once."""
    runs = []
    for path in dict.fromkeys(path.resolve() for path in paths):
        run = read_run(path)
        if run.results is None:
            raise NotFoundError(f"{path}: no results to compare ({run.problems.get('results.json', 'unreadable')})")
        runs.append(run)
    tell_apart(runs)
    return runs


def by_method(runs: Iterable[RunFolder]) -> list[MethodRow]:
    """A row for each method, the project's own first, then by name; seeds in order."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    order = sorted(groups, key=place)
    return [_row(name, sorted(groups[name], key=lambda run: run.results.seed if run.results else 0)) for name in order]


def place(method: str) -> tuple[int, str]:
    """What to sort methods by: the project's own first, then by name."""
    return PLAN.index(method) if method in PLAN else len(PLAN), method


def same_tasks(runs: Sequence[RunFolder]) -> bool:
    return all(_same_tasks(runs[0], run) for run in runs)


def _same_tasks(one: RunFolder, two: RunFolder) -> bool:
    """By names and, where both runs say, numbers of classes: which classes a split gives a task may depend on the seed."""
    sizes = zip(_sizes(one), _sizes(two), strict=False)
    return one.tasks == two.tasks and all(a == b or not a or not b for a, b in sizes)


def _sizes(run: RunFolder) -> list[int]:
    """Classes of each task; 0 where the run does not say."""
    return [len(classes) for classes in run.results.classes] if run.results is not None else [0] * len(run.tasks)


def doubts(rows: Sequence[MethodRow]) -> list[str]:
    """What speaks against putting the runs of ``rows`` side by side, a line each."""
    found = []
    runs = [run for row in rows for run in row.runs]
    other = next((run for run in runs if not _same_tasks(runs[0], run)), None)
    if other is not None:
        one, two = (
            ", ".join(f"{task} of {n} classes" if n else task for task, n in zip(run.tasks, _sizes(run), strict=False))
            for run in (runs[0], other)
        )
        names = f"{one[:120]} and {two[:120]}"
        found.append(f"the runs have different tasks ({names}): their numbers do not compare")
    if other is None and len(seen := {images: run for run in runs if (images := _images(run)) is not None}) > 1:
        one, two = [f"{run.path} of {count:,}" for (count, _), run in list(seen.items())[:2]]
        found.append(f"the runs saw different images ({one}, {two}): their numbers do not compare")
    ranks = sorted({run.results.world_size for run in runs if run.results is not None})
    if len(ranks) > 1:
        found.append(
            f"the runs are of {' and '.join(map(str, ranks))} processes, each with dataset.batch_size images a step"
        )
    if len({tuple(sorted(set(row.seeds))) for row in rows}) > 1:
        each = "; ".join(f"{row.method} {', '.join(map(str, row.seeds))}" for row in rows)
        found.append(f"the methods ran with different seeds ({each}): each mean is over its own")
    for row in rows:
        if len(set(row.seeds)) < len(row.seeds):
            found.append(f"{row.method}: several runs have the same seed; they are averaged as if they were seeds")
        apart = differences([run.config for run in row.runs])
        if apart:
            first = ", ".join(f"{key} ({', '.join(dict.fromkeys(values))})" for key, values in list(apart.items())[:3])
            found.append(f"{row.method}: its runs differ in {first}; they are averaged as if they were seeds")
    return found


def _images(run: RunFolder) -> tuple[int, str] | None:
    """Number of all images that a run trained and validated on, and a digest of their names where it holds them all.

    Which task and which part an image is in may depend on the seed. None where the run does not say.
    """
    parts = [part for task in run.data.values() if isinstance(task, dict) for part in task.values()]
    if not parts or not all(isinstance(part, dict) and isinstance(part.get("images"), int) for part in parts):
        return None
    names = [part.get("names") for part in parts]
    known = all(isinstance(some, list) for some in names)
    text = "\n".join(sorted(str(name) for some in names for name in some)) if known else ""
    return sum(part["images"] for part in parts), hashlib.sha256(text.encode()).hexdigest()


def summarise(values: Sequence[float | None]) -> Value | None:
    """Mean and standard deviation; None where there are none or one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) != len(values):
        return None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Value(mean, None, 1)
    return Value(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)), len(known))


def _row(method: str, runs: Sequence[RunFolder]) -> MethodRow:
    results = [run.results for run in runs if run.results is not None]
    values = {name: summarise([getattr(result, name) for result in results]) for name in COLUMNS}
    return MethodRow(method, tuple(result.seed for result in results), values, tuple(runs))
