"""Numbers of several runs together: runs of the same method and tasks are seeds of one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nostalgia.errors import NotFoundError
from nostalgia.reporting.results import METRICS
from nostalgia.reporting.run_folder import RunFolder, read_run

COLUMNS = (*METRICS, "seconds")
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
            raise NotFoundError(
                f"{path}: no results to compare ({run.problems.get('results.json', 'unreadable')})"
            )
        runs.append(run)
    return runs


def by_method(runs: Iterable[RunFolder]) -> list[MethodRow]:
    """A row for each method, the project's own first, then by name; seeds in order."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    order = sorted(groups, key=lambda name: (PLAN.index(name) if name in PLAN else len(PLAN), name))
    return [
        _row(name, sorted(groups[name], key=lambda run: run.results.seed if run.results else 0))
        for name in order
    ]


def check_same_tasks(runs: Sequence[RunFolder]) -> str | None:
    """What is wrong with putting ``runs`` side by side, in one line; None where they have the same tasks."""
    first = runs[0]
    for run in runs[1:]:
        if run.tasks != first.tasks:
            names = f"{', '.join(first.tasks)[:60]} and {', '.join(run.tasks)[:60]}"
            return f"the runs have different tasks ({names}): their numbers do not compare"
    return None


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
