"""Figures of curvature: spectra of tasks, angles between their eigenspaces. Interface as in `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nostalgia.analysis.figure_style import (
    GREY,
    NAMED_LINES,
    key_beside,
    line_style,
    new_figure,
    short,
    style,
)
from nostalgia.analysis.figures import heat_map
from nostalgia.analysis.run_figure import CURVATURE, RunFigure
from nostalgia.analysis.run_folder import TaskCurvature


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a finished task, decreasing; ``residuals`` are |H q - lambda q| where they are known."""

    task: str
    eigenvalues: Sequence[float]  # (k,)
    residuals: Sequence[float] = ()  # (k,) or none
    converged: Sequence[bool] = ()  # (k,) or none: all
    density: tuple[Sequence[float], Sequence[float]] | None = None  # grid of eigenvalues, density there


def spectrum(tasks: Sequence[Spectrum]) -> Figure:
    """Eigenvalues of each task with residuals and the rank cut; the densities, where estimated, beside."""
    usable = [task for task in tasks if len(task.eigenvalues)]
    if not usable:
        raise ValueError("no eigenvalues were computed (curvature/ is empty)")
    dense = [task for task in usable if task.density is not None]
    with style():
        figure = new_figure(9.6 if dense else 6.4, 3.8)
        panels = figure.subplots(1, 2 if dense else 1, squeeze=False)[0]
        _eigenvalue_panel(panels[0], usable)
        if dense:
            _density_panel(panels[1], dense, [usable.index(task) for task in dense], len(usable))
        key_beside(panels[-1], len(usable), "after task", also=("not converged",))
    return figure


def subspace_overlap(tasks: Sequence[str], angles: Mapping[tuple[int, int], Sequence[float]]) -> Figure:
    """How far tasks' eigenspaces share directions; ``angles``: (earlier, later) -> principal angles, radians.

    Left: mean squared cosine of each pair. Right: the angles themselves, of neighbouring tasks where there
    are many.
    """
    known = {pair: np.asarray(a, dtype=float) for pair, a in angles.items() if len(a)}
    if not known:
        raise ValueError("principal angles need the eigenspaces of two tasks")
    count = len(tasks)
    overlap = np.full((count, count), np.nan)
    for (early, late), values in known.items():
        overlap[late, early] = float(np.mean(np.cos(values) ** 2))
    shown = overlap[1:, : count - 1]
    side = min(0.5 * count + 2.4, 6.4)
    with style():
        figure = new_figure(side + 5.6, max(3.6, side * 0.82))
        left, right = figure.subplots(1, 2, width_ratios=(side, 5.0))
        heat_map(left, shown, None, colorbar="overlap: mean cos² of the angles")
        _name_pairs(left, tasks)
        left.set_title("Overlap of eigenspaces")
        _angle_panel(right, tasks, known)
    return figure


def curvature_share(tasks: Sequence[Spectrum], traces: Sequence[float | None]) -> Figure:
    """Share of a task's curvature in its first i eigenpairs: of the trace where known, else of the top k."""
    usable = [(task, trace) for task, trace in zip(tasks, traces, strict=True) if max(task.eigenvalues, default=0) > 0]
    if not usable:
        raise ValueError("no positive eigenvalues were computed (curvature/ is empty)")
    of_trace = all(trace is not None and trace > 0 for _, trace in usable)
    with style():
        figure = new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        for i, (task, trace) in enumerate(usable):
            sums = np.cumsum(np.maximum(task.eigenvalues, 0.0))
            share = sums / (trace if of_trace and trace else sums[-1])
            every = max(1, len(sums) // 10)
            axes.plot(np.arange(1, len(sums) + 1), share, label=short(task.task), markevery=every,
                      **line_style(i, len(usable)))  # fmt: skip
        axes.set_ylim(0, None if of_trace else 1.02)
        axes.set_xlabel("number of eigenpairs")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_ylabel("share of the trace" if of_trace else "share of the sum of those computed")
        axes.set_title("Curvature held by the first eigenpairs")
        key_beside(axes, len(usable), "after task")
    return figure


def _eigenvalue_panel(axes: Axes, tasks: Sequence[Spectrum]) -> None:
    hidden = 0
    for i, task in enumerate(tasks):
        values = np.asarray(task.eigenvalues, dtype=float)
        index = np.arange(1, len(values) + 1)
        positive = values > 0
        hidden += int((~positive).sum())
        errors = np.asarray(task.residuals, dtype=float) if len(task.residuals) else None
        if errors is not None:  # the lower end of a bar must stay on a logarithmic axis
            errors = np.stack([np.minimum(errors, 0.99 * np.abs(values)), errors])[:, positive]
        look = line_style(i, len(tasks))
        every = max(1, len(values) // 12)
        axes.errorbar(index[positive], values[positive], yerr=errors, elinewidth=0.7, capsize=1.2,
                      markevery=(i % every, every), label=short(task.task), **look)  # fmt: skip
        loose = positive & ~np.asarray(task.converged, dtype=bool) if len(task.converged) else np.zeros_like(positive)
        axes.plot(index[loose], values[loose], ls="", marker="x", ms=6, mew=1.2, color="black", zorder=5)
    if any(not all(task.converged) for task in tasks):
        axes.errorbar([], [], ls="", marker="x", ms=6, mew=1.2, color="black", label="not converged")
    axes.set_yscale("log")
    rank = max(len(task.eigenvalues) for task in tasks)
    axes.axvline(rank + 0.5, color=GREY, lw=1.0, ls="--")
    axes.set_xlim(0, rank * 1.08 + 1.5)
    note: dict[str, Any] = {"rotation": 90, "va": "top", "ha": "left", "fontsize": 7.5, "color": "0.3"}
    axes.text(rank * 1.015 + 0.7, 0.98, f"rank cut, k = {rank}", transform=axes.get_xaxis_transform(), **note)
    axes.set_xlabel("number of the eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_ylabel("eigenvalue λ (loss / parameter²)")
    missing = f"\n({hidden} not positive, not shown)" if hidden else ""
    axes.set_title(f"Top of each task's spectrum, bars: residual |Hq - λq|{missing}")


def _density_panel(axes: Axes, tasks: Sequence[Spectrum], places: Sequence[int], count: int) -> None:
    for place, task in zip(places, tasks, strict=True):
        assert task.density is not None
        grid, density = (np.asarray(part, dtype=float) for part in task.density)
        look = {**line_style(place, count), "marker": ""}
        axes.plot(grid, np.maximum(density, 1e-12), label=short(task.task), **look)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    axes.set_xlabel("eigenvalue λ")
    axes.set_ylabel("density (1 / λ)")
    axes.set_title("Estimated density of the whole spectrum")


def _name_pairs(axes: Axes, tasks: Sequence[str]) -> None:
    count = len(tasks)
    named = count <= 8
    columns = [short(name, 14) if named else str(u) for u, name in enumerate(tasks[:-1], start=1)]
    rows = [short(name, 14) if named else str(t) for t, name in enumerate(tasks[1:], start=2)]
    rotated: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if named and count > 2 else {}
    axes.set_xticks(range(count - 1), columns, **rotated)
    axes.set_yticks(range(count - 1), rows)
    axes.set_xlabel("earlier task")
    axes.set_ylabel("later task")


def _angle_panel(axes: Axes, tasks: Sequence[str], known: Mapping[tuple[int, int], np.ndarray]) -> None:
    pairs = sorted(known)
    everything = len(pairs) <= 6
    drawn = pairs if everything else [pair for pair in pairs if pair[1] == pair[0] + 1]
    for i, (early, late) in enumerate(drawn):
        degrees = np.sort(np.degrees(known[early, late]))
        every = max(1, len(degrees) // 10)
        label = f"tasks {early + 1} and {late + 1}"
        axes.plot(np.arange(1, len(degrees) + 1), degrees, label=label, markevery=every, **line_style(i, len(drawn)))
    axes.axhline(90, color=GREY, lw=0.8, ls="--")
    axes.set_ylim(0, 96)
    axes.set_yticks(range(0, 91, 15))
    axes.set_xlabel("number of the angle")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_ylabel("principal angle (degrees)")
    axes.set_title("Principal angles" + ("" if everything else " of neighbouring tasks"))
    key_beside(axes, len(drawn), "between" if len(drawn) <= NAMED_LINES else "earlier of the two tasks")


def as_spectrum(curvature: TaskCurvature) -> Spectrum:
    density = curvature.raw.get("density")
    return Spectrum(
        task=curvature.task,
        eigenvalues=curvature.eigenvalues,
        residuals=curvature.residuals,
        converged=curvature.converged,
        density=(density["grid"], density["density"]) if _is_density(density) else None,
    )


def task_angles(
    curvature: Sequence[TaskCurvature],
) -> tuple[list[str], dict[tuple[int, int], list[float]]]:
    """Names of the tasks and (earlier, later) -> principal angles; the files name or number tasks."""
    names = [c.task for c in curvature]
    places = {name: i for i, name in enumerate(names)} | {str(c.index): i for i, c in enumerate(curvature)}
    found = {
        (places[early], late): angles
        for late, c in enumerate(curvature)
        for early, angles in c.principal_angles.items()
        if places.get(early, late) < late
    }
    return names, found


def _is_density(value: Any) -> TypeGuard[dict[str, list[float]]]:
    return isinstance(value, dict) and {"grid", "density"} <= set(value)


RUN_FIGURES = (
    RunFigure(
        "spectrum",
        CURVATURE,
        "Largest eigenvalues of each task's curvature at its end. The rank cut is where the memory stops.",
        lambda run: spectrum([as_spectrum(task) for task in run.curvature]),
    ),
    RunFigure(
        "curvature_share",
        CURVATURE,
        "How much of a task's curvature its first eigenpairs hold.",
        lambda run: curvature_share(
            [as_spectrum(task) for task in run.curvature], [task.raw.get("trace") for task in run.curvature]
        ),
    ),
    RunFigure(
        "subspace_overlap",
        CURVATURE,
        "0: orthogonal eigenspaces, protecting one costs the other nothing. 1: the same directions.",
        lambda run: subspace_overlap(*task_angles(run.curvature)),
    ),
)
