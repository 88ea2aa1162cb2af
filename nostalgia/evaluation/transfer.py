"""Numbers of a sequence of tasks, from the accuracy matrix A[t][u]: after training task t, on task u.

    acc                = mean over u of A[T][u]
    bwt                = mean over u < T of A[T][u] - A[u][u]
    forgetting         = mean over u < T of max over u <= t < T of A[t][u], minus A[T][u]
    learning_accuracy  = mean over u of A[u][u]
    fwt                = mean over u > 1 of (before[u] - baseline[u])

All are fractions. An accuracy that was not measured is None: above the diagonal, and for joint training in
every row but the last. T is the last row with a number, so that the functions also serve a run under way;
rows may end at the diagonal. bwt, forgetting and fwt are None for one task; what was not measured makes a
number None.

>>> matrix = [[0.9, None], [0.7, 0.8]]
>>> acc(matrix), round(bwt(matrix), 3), round(forgetting(matrix), 3), round(learning_accuracy(matrix), 3)
(0.75, -0.2, 0.2, 0.85)
"""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[float | None]
Matrix = Sequence[Row]


def finished_rows(matrix: Matrix) -> list[list[float | None]]:
    """The rows up to the last one with a number, each with as many columns: a square matrix of T tasks."""
    filled = [t for t, row in enumerate(matrix) if any(value is not None for value in row)]
    size = filled[-1] + 1 if filled else 0
    return [[*row[:size], *[None] * (size - len(row))] for row in matrix[:size]]


def acc(matrix: Matrix) -> float | None:
    """Mean accuracy over all tasks at the end."""
    rows = finished_rows(matrix)
    return _mean(rows[-1]) if rows else None


def learning_accuracy(matrix: Matrix) -> float | None:
    """Mean accuracy on each task right after it was learned."""
    return _mean([row[u] for u, row in enumerate(finished_rows(matrix))])


def bwt(matrix: Matrix) -> float | None:
    """Backward transfer (Lopez-Paz and Ranzato 2017): mean change of accuracy since a task was learned."""
    rows = finished_rows(matrix)
    return _mean([_difference(rows[-1][u], rows[u][u]) for u in range(len(rows) - 1)])


def forgetting(matrix: Matrix) -> float | None:
    """Forgetting (Chaudhry et al. 2018): mean drop from the best earlier accuracy; may be negative."""
    return _mean(forgetting_per_task(matrix))


def forgetting_per_task(matrix: Matrix) -> list[float | None]:
    """Drop of each task but the last from its best earlier accuracy to its final one."""
    rows = finished_rows(matrix)
    last = len(rows) - 1
    drops: list[float | None] = []
    for u in range(last):
        seen = [rows[t][u] for t in range(u, last)]
        known = [a for a in seen if a is not None]
        drops.append(_difference(max(known), rows[last][u]) if len(known) == len(seen) else None)
    return drops


def average_accuracies(matrix: Matrix) -> list[float | None]:
    """After each task t, the mean accuracy over the tasks seen: mean over u <= t of A[t][u]."""
    return [_mean(row[: t + 1]) for t, row in enumerate(finished_rows(matrix))]


def fwt(before: Row | None, baseline: Row | None) -> float | None:
    """Forward transfer: accuracy on a task just before training it, against the backbone as it was at first.

    Both lists have an entry a task; the first task's do not count. In both cases only the head was fitted.
    None in place of a list: not measured (no head warm-up). Raises ValueError where the lengths differ.
    """
    if before is None or baseline is None:
        return None
    pairs = list(zip(before, baseline, strict=True))[1:]
    return _mean([_difference(a, b) for a, b in pairs])


def _mean(values: Row) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
