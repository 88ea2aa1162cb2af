"""Figures of the method's theory: predicted against measured forgetting, and where in the network the memory lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nostalgia.analysis.figure_style import GREY, key_beside, line_style, new_figure, short, style
from nostalgia.analysis.run_figure import CURVATURE, PREDICTED, RunFigure
from nostalgia.analysis.run_folder import TaskCurvature
from nostalgia.logging.csv_log import Record

ABOVE = "above the bound"
ROWS = 40  # parameters an axis names before they are taken together by module


def forgetting_prediction(groups: Mapping[str, Sequence[Record]], title: str = "increase of task") -> Figure:
    """Measured increase of finished tasks' losses against the prediction, and against the bound beside it.

    ``groups``: what the colours tell apart, tasks of a run or methods -> rows of results/forgetting_prediction.json.
    """
    points = {name: _columns(rows) for name, rows in groups.items() if rows}
    if not points:
        raise ValueError("no later task was measured against a prediction (analysis.predict_forgetting)")
    everything = np.concatenate(list(points.values()))  # (n, 3): predicted, measured, bound
    with style():
        figure = new_figure(8.8, 3.7)
        left, right = figure.subplots(1, 2, sharey=True)
        for i, (name, values) in enumerate(points.items()):
            look = {**line_style(i, len(points)), "ls": "", "ms": 5.5}
            left.plot(values[:, 0], values[:, 1], label=short(name), **look)
            positive = values[:, 2] > 0
            right.plot(values[positive, 2], values[positive, 1], label=short(name), **{**look, "mfc": "white"})
        _prediction_panel(left, everything)
        _bound_panel(right, everything)
        key_beside(right, len(points), title, also=(ABOVE,))
    return figure


def _prediction_panel(axes: Axes, points: np.ndarray) -> None:
    low, high = points[:, :2].min(), points[:, :2].max()
    margin = 0.08 * (high - low) or 0.1
    ends = (min(low, 0.0) - margin, max(high, 0.0) + margin)
    axes.plot(ends, ends, color=GREY, lw=1.0, ls="--", zorder=1)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.annotate("equal", (ends[1] - margin, ends[1] - margin), fontsize=7.5, color="0.3", xytext=(-4, 0),
                  textcoords="offset points", ha="right", va="center")  # fmt: skip
    axes.axhline(0, color=GREY, lw=0.6)
    axes.axvline(0, color=GREY, lw=0.6)
    axes.set_xlabel("predicted increase (nats a sample)")
    axes.set_ylabel("measured increase (nats a sample)")
    axes.set_title("Loss increase of finished tasks:\nmeasured against predicted")


def _bound_panel(axes: Axes, points: np.ndarray) -> None:
    """Above the line the loss rose by more than the bound allows what lies outside the memory to add."""
    bounds = points[points[:, 2] > 0, 2]
    axes.set_title("Measured against the bound,\n½ λₖ |d⊥|²")
    axes.set_xlabel("bound (nats a sample, logarithmic)")
    axes.axhline(0, color=GREY, lw=0.6)
    if not len(bounds):
        axes.text(0.5, 0.5, "no bound: λₖ is not positive", transform=axes.transAxes, ha="center", color="0.3")
        return
    bottom, top = axes.get_ylim()
    low, high = bounds.min() / 1.6, bounds.max() * 1.6
    grid = np.geomspace(low, high, 200)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.plot(grid, grid, color=GREY, lw=1.0, ls="--", zorder=1)
    decades = float(np.log10(high / low))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if low < top:
        axes.fill_between(grid, grid, top, where=list(grid < top), color="0.9", lw=0, zorder=0, label=ABOVE)
    axes.set_ylim(bottom, top)


def _columns(rows: Sequence[Record]) -> np.ndarray:
    return np.array([[row["predicted"], row["measured"], row["bound"]] for row in rows], dtype=float)


@dataclass(frozen=True)
class Shares:
    """Share of each parameter tensor in a task's directions and in the memory after it, weighted by eigenvalue."""

    task: str
    names: Sequence[str]
    sizes: Sequence[float]  # how many numbers each parameter has
    own: Sequence[float]
    memory: Sequence[float] = ()


def importance(tasks: Sequence[Shares]) -> Figure:
    """Where the directions lie: the memory's at the end, each task's own, and what an even spread would give."""
    usable = [task for task in tasks if list(task.names) == list(tasks[-1].names)]
    if not usable:
        raise ValueError("no shares of the parameters in curvature/task<i>.json (an older version wrote none)")
    last = usable[-1]
    groups = group_parameters(last.names)
    labels = list(groups)
    y = np.arange(len(labels))
    with style():
        figure = new_figure(7.4, max(2.6, 1.3 + 0.19 * len(labels)))
        axes = figure.add_subplot()
        if len(last.memory):
            axes.barh(y, _summed(last.memory, groups), height=0.72, color="0.82", label="memory at the end")
        for i, task in enumerate(usable):
            look: dict[str, Any] = {**line_style(i, len(usable)), "ls": "", "ms": 4.0}
            axes.plot(_summed(task.own, groups), y, label=short(task.task), **look)
        even = _summed(np.asarray(last.sizes, dtype=float) / max(sum(last.sizes), 1), groups)
        axes.plot(even, y, ls="", marker="|", ms=8, mew=1.1, color="black", label="if spread evenly")
        axes.set_yticks(y, [short(label, 44) for label in labels], fontsize=7.5)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the curvature, Σ λᵢ |qᵢ on the parameter|² / Σ λᵢ")
        axes.set_title("Importance: where in the network the directions lie")
        key_beside(axes, len(usable), "directions of", also=("memory at the end", "if spread evenly"))
    return figure


def group_parameters(names: Sequence[str], rows: int = ROWS) -> dict[str, list[int]]:
    """Label -> places of ``names``, in order: one a parameter, or by module, as deep as ``rows`` labels allow."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    parts = [p[common:] for p in parts]
    groups: dict[str, list[int]] = {}
    for depth in range(max(map(len, parts)), 0, -1):
        groups = {}
        for place, part in enumerate(parts):
            groups.setdefault(".".join(part[:depth]), []).append(place)
        if len(groups) <= rows:
            break
    return groups


def _summed(values: Sequence[float] | np.ndarray, groups: Mapping[str, Sequence[int]]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return np.array([array[list(places)].sum() for places in groups.values()])


def task_shares(curvature: Sequence[TaskCurvature]) -> list[Shares]:
    """Shares of the parameters of each task whose file has them."""
    found = []
    for c in curvature:
        names, sizes, own, memory = (
            c.raw.get(key) or [] for key in ("parameters", "parameter_sizes", "importance", "memory_importance")
        )
        if names and len(names) == len(sizes) == len(own) and len(memory) in (0, len(names)):
            found.append(Shares(c.task, names, sizes, own, memory))
    return found


def by_task(rows: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    return groups


RUN_FIGURES = (
    RunFigure(
        "importance",
        CURVATURE,
        "Share of each parameter tensor in the protected directions, weighted by eigenvalue.",
        lambda run: importance(task_shares(run.curvature)),
    ),
    RunFigure(
        "forgetting_prediction",
        PREDICTED,
        "Left: on the line the theory is exact. Right: in the grey the loss rose by more than the bound, so the displacement "
        "is too large for second order, or the gradient at the task's end was not small.",
        lambda run: forgetting_prediction(by_task(run.forgetting["rows"])),
    ),
)
