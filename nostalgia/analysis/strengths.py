"""Finds in run folders which of them are one method at several strengths, for the comparison at equal learning accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from nostalgia.analysis.frontier import Frontier, frontier
from nostalgia.analysis.run_folder import RunFolder
from nostalgia.analysis.settings import differences
from nostalgia.logging.results import RunResults


def by_strength(runs: Sequence[RunFolder]) -> dict[tuple[str, float | None], list[RunFolder]]:
    """Finished runs by method and strength: the one number among the method's options in which its runs differ.

    The strength is None where a method's runs differ in none, in several, or in a word.
    """
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    found: dict[tuple[str, float | None], list[RunFolder]] = {}
    for method, own in groups.items():
        for run, strength in zip(own, _strengths(own), strict=True):
            found.setdefault((method, strength), []).append(run)
    return found


def frontier_of(runs: Sequence[RunFolder], select_seeds: Sequence[int] = ()) -> Frontier | None:
    """The comparison at equal learning accuracy; None where no method has several strengths."""
    groups = by_strength(runs)
    if all(strength is None for _, strength in groups):
        return None
    cells: dict[tuple[str, float | None], list[RunResults]] = {
        key: [run.results for run in own if run.results is not None] for key, own in groups.items()
    }
    return frontier(cells, select_seeds)


def at_chosen(runs: Sequence[RunFolder], found: Frontier) -> list[RunFolder]:
    """The runs that stand in the rows of ``found``."""
    groups = by_strength(runs)
    rows = [row.point for row in found.rows]
    return [run for p in rows for run in groups[p.method, p.strength] if run.results and run.results.seed in p.seeds]


def _strengths(runs: Sequence[RunFolder]) -> list[float | None]:
    apart = {
        key: values for key, values in differences([run.config for run in runs]).items() if key.startswith("method.")
    }
    if len(apart) != 1:
        return [None] * len(runs)
    (values,) = apart.values()
    try:
        return [float(value) for value in values]
    except ValueError:
        return [None] * len(runs)
