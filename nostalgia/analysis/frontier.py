"""Comparison at equal learning accuracy: each method over its strengths, and the strength at which it is reported.

The chosen strength of a method is, among those whose mean learning accuracy is at least fine-tuning's minus `MARGIN`, the
one of the highest mean final accuracy; where none is, the one of the highest learning accuracy, and the row says so. With
selection seeds the choice is made on those, and the numbers are of the others.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nostalgia.logging.results import RunResults
from nostalgia.utils.files import write_atomic, write_json

BASELINE = "finetune"
MARGIN = 0.005
COLUMNS = ("acc", "bwt", "forgetting_left", "learning_accuracy", "class_incremental", "bytes", "seconds", "overhead")
TITLES = {
    "acc": "ACC", "bwt": "BWT", "forgetting_left": "left", "learning_accuracy": "LA", "class_incremental": "class-inc",
    "bytes": "bytes", "seconds": "s", "overhead": "extra s",
}  # fmt: skip
HEAD = ("method", "strength", *TITLES.values(), "p")
Cells = Mapping[tuple[str, float | None], Sequence[RunResults]]  # (method, strength) -> its seeds


@dataclass(frozen=True)
class Point:
    """One method at one strength: means and standard errors over seeds; None where a run has no such number."""

    method: str
    strength: float | None
    seeds: list[int]
    mean: dict[str, float | None]
    error: dict[str, float | None]  # standard deviation (n - 1) / sqrt(n); None for one seed


@dataclass(frozen=True)
class Row:
    """A method at its chosen strength."""

    point: Point
    reaches: bool | None  # whether its learning accuracy is within the margin of fine-tuning's; None where it has none
    p_value: float | None  # paired t test of final accuracies against fine-tuning's, same seeds; None under two pairs


@dataclass(frozen=True)
class Frontier:
    """All points, and the table at equal learning accuracy."""

    points: list[Point]
    rows: list[Row]
    selected_on: list[int]  # seeds; empty: on the reported ones themselves
    undecided: list[str] = field(default_factory=list)
    """Methods of several strengths whose runs on those seeds, or fine-tuning's, are missing."""


def frontier(cells: Cells, select_seeds: Sequence[int] = ()) -> Frontier:
    """The comparison of ``cells``; a method without fine-tuning beside it has no share of forgetting left."""
    reported = {key: [r for r in runs if r.seed not in select_seeds] for key, runs in cells.items()}
    chosen_on = (
        {key: [r for r in runs if r.seed in select_seeds] for key, runs in cells.items()} if select_seeds else reported
    )
    points, compared = _points(reported), any(runs and key[0] == BASELINE for key, runs in cells.items())
    rows, undecided = [], []
    for method in dict.fromkeys(p.method for p in points):
        own = [p for p in points if p.method == method]
        candidates = _points(_over_common_seeds(chosen_on, method))
        if compared and not any(p.method == BASELINE for p in candidates):
            candidates = []
        if not any(p.method == method for p in candidates):
            if len(own) > 1:
                undecided.append(method)
                continue
            candidates = _points(_over_common_seeds(reported, method))  # nothing is to be chosen
        baseline = next((p for p in candidates if p.method == BASELINE), None)
        least = None if baseline is None else _number(baseline, "learning_accuracy") - MARGIN
        best, reaches = _choose([p for p in candidates if p.method == method], least)
        point = next((p for p in own if p.strength == best.strength), None)
        if point is None:  # the chosen strength has no reported run yet
            undecided.append(method)
        else:
            rows.append(Row(point, reaches, _p_value(reported, point)))
    rows.sort(key=lambda row: -(row.point.mean["acc"] or 0.0))
    return Frontier(points, rows, list(select_seeds), undecided)


def _over_common_seeds(cells: Cells, method: str) -> Cells:
    """Fine-tuning and all strengths of ``method``, over the seeds that all of them have: those of a sweep that is not complete
    would else be compared over easier and harder ones. As they are where no seed is common."""
    own = {key: runs for key, runs in cells.items() if runs and key[0] in (method, BASELINE)}
    common = set.intersection(*({run.seed for run in runs} for runs in own.values())) if own else set()
    return {key: [run for run in runs if run.seed in common] for key, runs in own.items()} if common else own


def _points(cells: Cells) -> list[Point]:
    baseline = {r.seed: r.bwt for r in cells.get((BASELINE, None), ())}
    found = []
    for (method, strength), runs in cells.items():
        if not runs:
            continue
        values = [_values(run) for run in runs]
        columns = {name: [v[name] for v in values] for name in values[0]}
        mean, error = ({name: of(column) for name, column in columns.items()} for of in (_mean, _standard_error))
        mean["forgetting_left"], error["forgetting_left"] = _forgetting_left(runs, baseline), None
        found.append(Point(method, strength, sorted(run.seed for run in runs), mean, error))
    return found


def _forgetting_left(runs: Sequence[RunResults], baseline: Mapping[int, float | None]) -> float | None:
    """Mean backward transfer over the baseline's mean, both over the seeds that both have.

    None where the baseline forgets nothing. Of the means: a seed on which the baseline happens to forget little would decide
    a mean of ratios.
    """
    pairs = [(run.bwt, baseline.get(run.seed)) for run in runs]
    known = [(own, plain) for own, plain in pairs if own is not None and plain is not None]
    whole = math.fsum(plain for _, plain in known)
    return math.fsum(own for own, _ in known) / whole if whole < 0 else None


def _values(run: RunResults) -> dict[str, float | None]:
    """The columns of one run."""
    return {
        "acc": run.acc,
        "bwt": run.bwt,
        "learning_accuracy": run.learning_accuracy,
        "class_incremental": run.class_incremental_acc,
        "bytes": None if run.memory_bytes is None else float(run.memory_bytes),
        "seconds": run.seconds,
        "overhead": run.extra_seconds,
    }


def _choose(points: Sequence[Point], least: float | None) -> tuple[Point, bool | None]:
    if all(p.mean["learning_accuracy"] is None for p in points):  # joint training: no task is learned before another
        return max(points, key=lambda p: _number(p, "acc")), None
    fitting = [p for p in points if least is None or _number(p, "learning_accuracy") >= least]
    if fitting:
        return max(fitting, key=lambda p: _number(p, "acc")), True
    return max(points, key=lambda p: _number(p, "learning_accuracy")), False


def _p_value(cells: Cells, point: Point) -> float | None:
    """Two-sided paired t test over the seeds that both have."""
    theirs = {r.seed: r.acc for r in cells.get((BASELINE, None), ())}
    pairs = [(r.acc, theirs[r.seed]) for r in cells[(point.method, point.strength)] if r.seed in theirs]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    differences = [a - b for a, b in known]
    if point.method == BASELINE or len(known) < 2 or max(differences) - min(differences) < 1e-9:  # equal, to rounding
        return None
    from scipy.stats import ttest_rel  # half a second to import

    return float(ttest_rel(*zip(*known, strict=True)).pvalue)


def write_frontier(folder: Path, found: Frontier) -> dict[str, Path]:
    """frontier.json (all points and rows), frontier.csv and frontier.md (the table); returns their paths by name."""
    paths = {name: folder / name for name in ("frontier.json", "frontier.csv", "frontier.md")}
    write_json(paths["frontier.json"], {"definition": " ".join((__doc__ or "").split()), **asdict(found)})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "strength", "seeds", *(f"{c}{e}" for c in COLUMNS for e in ("", "_se")), "reaches_la", "p"]
    )
    for row in found.rows:
        numbers = [value for c in COLUMNS for value in (row.point.mean[c], row.point.error[c])]
        seeds = " ".join(map(str, row.point.seeds))
        writer.writerow([row.point.method, row.point.strength, seeds, *numbers, row.reaches, row.p_value])
    write_atomic(paths["frontier.csv"], text.getvalue())
    write_atomic(paths["frontier.md"], markdown(found))
    return paths


def markdown(found: Frontier) -> str:
    """The table at equal learning accuracy, with what its words mean."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in found.rows]
    return "\n".join([*lines, "", note(found)]) + "\n"


def note(found: Frontier) -> str:
    """How the table is made: the choice of strengths, and its statistics by name."""
    seeds = (
        f"on seeds {', '.join(map(str, found.selected_on))}, others reported"
        if found.selected_on
        else "on the seeds shown"
    )
    by_seeds: dict[str, list[str]] = {}
    for row in found.rows:
        by_seeds.setdefault(", ".join(map(str, row.point.seeds)), []).append(row.point.method)
    apart = "; ".join(f"{', '.join(methods)} over {shown}" for shown, methods in by_seeds.items())
    incomplete = f"Not all rows are over the same seeds: {apart}. " if len(by_seeds) > 1 else ""
    if found.undecided:
        incomplete += f"Not chosen yet, for want of runs: the strength of {', '.join(found.undecided)}. "
    return incomplete + (
        f"Strength of the highest ACC among those with LA within {MARGIN:.3f} of fine-tuning's, chosen {seeds}; * where none "
        "is: then that of the highest LA. left: mean BWT over fine-tuning's; class-inc: ACC with the task unknown; bytes: kept "
        "between tasks; extra s: added by the method; ± standard error over seeds; p: two-sided paired t test of ACC against "
        "fine-tuning's, not corrected for the number of methods."
    )


def cells(row: Row) -> list[str]:
    """A row of the table as texts."""
    point, shown = row.point, []
    for name in COLUMNS:
        mean, error = point.mean[name], point.error[name]
        if mean is None:
            shown.append("-")
        elif name in ("bytes", "seconds", "overhead"):
            shown.append(f"{mean / 1e6:.1f} MB" if name == "bytes" else f"{mean:.0f}")
        elif name == "forgetting_left":
            shown.append(f"{round(100 * mean) or 0}%")
        else:
            shown.append(f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    strength = "-" if point.strength is None else f"{point.strength:g}"
    return [
        point.method,
        strength + (" *" if row.reaches is False else ""),
        *shown,
        "-" if row.p_value is None else f"{row.p_value:.2g}",
    ]


def _number(point: Point, name: str) -> float:
    value = point.mean[name]
    return -math.inf if value is None else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _standard_error(values: Sequence[Any]) -> float | None:
    mean = _mean(values)
    if mean is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
