"""Figures of accuracies and forgetting; several seeds are drawn as mean with standard deviation.

A ``matrix`` is that of `evaluation.transfer`; ``matrices`` are those of several seeds over the same tasks.
All functions return a matplotlib figure and raise ValueError, with the reason in one line, where it cannot be
drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nostalgia.analysis.figure_style import (
    GREY,
    key_beside,
    legend_beside,
    line_style,
    new_figure,
    short,
    style,
    task_ticks,
    text_color,
)
from nostalgia.analysis.run_figure import ACCURACY, RunFigure
from nostalgia.evaluation import transfer

Matrices = Sequence[transfer.Matrix]


def accuracy_vs_task(tasks: Sequence[str], matrices: Matrices) -> Figure:
    """Accuracy on each task, from when it was learned to the end of the run."""
    values = _stack(matrices)  # (S, T, T)
    count = values.shape[1]
    _need(np.isfinite(values).any(), "no accuracy was measured")
    with style():
        figure = new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        for u, name in enumerate(tasks):
            _errorbar(axes, np.arange(1, count + 1), values[:, :, u], label=_label(u, name), **line_style(u, count))
        axes.set_title(_titled("Accuracy on each task as training goes on", len(matrices)))
        axes.set_ylabel("validation accuracy (fraction)")
        _fraction_axis(axes, values)
        task_ticks(axes, tasks)
        key_beside(axes, count, "accuracy on task")
    return figure


def average_accuracy(tasks: Sequence[str], methods: Mapping[str, Matrices]) -> Figure:
    """Mean accuracy over the tasks seen so far, a line for each method."""
    curves = {name: _per_row(m, transfer.average_accuracies) for name, m in methods.items()}
    return _method_curves(
        tasks, curves, "Average accuracy over the tasks seen", "mean accuracy (fraction)", fraction=True
    )


def forgetting(tasks: Sequence[str], methods: Mapping[str, Matrices]) -> Figure:
    """Forgetting after each task, a line for each method; with one method also each task's own."""
    _need(len(tasks) > 1, "forgetting is defined from two tasks on, the run has one")
    title, label = "Forgetting: drop from a task's best accuracy", "forgetting (fraction)"
    curves = {name: _running_forgetting(m) for name, m in methods.items()}
    _need(
        any(np.isfinite(c).any() for c in curves.values()),
        "no task was measured before and after another one",
    )
    if len(methods) > 1:
        return _method_curves(tasks, curves, f"{title}, mean over tasks", label, zero=True)
    ((_, matrices),) = methods.items()
    with style():
        figure = new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        _task_forgetting_lines(axes, tasks, matrices)
        _errorbar(
            axes,
            np.arange(1, len(tasks) + 1),
            _running_forgetting(matrices),
            label="mean",
            color="black",
            marker="_",
            lw=2.2,
        )
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(_titled(title, len(matrices)))
        axes.set_ylabel(label)
        task_ticks(axes, tasks, first=2)
        key_beside(axes, len(tasks), "forgetting of task", also=("mean",))
    return figure


def accuracy_matrix(tasks: Sequence[str], matrices: Matrices, method: str = "") -> Figure:
    """The accuracy matrix as a heat map with its numbers (mean and standard deviation of several seeds)."""
    values = _stack(matrices)
    _need(np.isfinite(values).any(), "no accuracy was measured")
    mean, std = _mean_std(values)
    count = len(tasks)
    side = min(0.62 * count + 2.2, 7.4) if count > 2 else 3.9
    with style():
        figure = new_figure(side + 0.9, max(side - 0.3, 2.6))
        axes = figure.add_subplot()
        heat_map(axes, mean, std if len(matrices) > 1 else None, colorbar="validation accuracy (fraction)")
        axes.set_title(_titled(f"Accuracy matrix{method and f' of {short(method, 40)}'}", len(matrices)))
        _name_both_axes(axes, tasks)
        axes.set_xlabel("evaluated on task")
        axes.set_ylabel("after training task")
    return figure


def heat_map(
    axes: Axes,
    values: np.ndarray,  # (rows, columns), NaN: not measured
    spread: np.ndarray | None,
    *,
    colorbar: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """A sequential heat map; each cell holds its number, in black or white by the cell's luminance."""
    colormap = mpl.colormaps["viridis"].with_extremes(bad="0.96")
    image = axes.imshow(values, cmap=colormap, vmin=limits[0], vmax=limits[1], aspect="equal")
    count = max(values.shape)
    digits = 3 if count <= 6 else 2
    size = {True: 9.0, False: 7.5}[count <= 6] if count <= 12 else 5.0
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        text = f"{value:.{digits}f}"
        text = text if count <= 6 else text.replace("0.", ".", 1)
        if spread is not None and np.isfinite(spread[row, column]) and count <= 12:
            text += f"\n±{spread[row, column]:.{digits}f}"
        color = text_color(colormap(float((value - limits[0]) / (limits[1] - limits[0]))))
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color, linespacing=0.95)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, aspect=22, pad=0.03)
    bar.set_label(colorbar)
    bar.outline.set_visible(False)


def _name_both_axes(axes: Axes, tasks: Sequence[str]) -> None:
    count = len(tasks)
    named = count <= 10
    axes.set_yticks(range(count), [_label(t, n) if named else str(t + 1) for t, n in enumerate(tasks)])
    rotated: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if named and count > 2 else {}
    axes.set_xticks(range(count), [_label(t, n) if named else str(t + 1) for t, n in enumerate(tasks)], **rotated)


def _method_curves(
    tasks: Sequence[str],
    curves: Mapping[str, np.ndarray],  # (S, T) each
    title: str,
    label: str,
    *,
    fraction: bool = False,
    zero: bool = False,
) -> Figure:
    everything = np.concatenate([c.ravel() for c in curves.values()])
    _need(np.isfinite(everything).any(), "no accuracy was measured")
    with style():
        figure = new_figure(6.0 if len(curves) > 1 else 5.6, 3.4)
        axes = figure.add_subplot()
        for i, (name, values) in enumerate(curves.items()):
            if not np.isfinite(values).any():
                continue
            shown = short(name, 40)
            named = {"label": f"{shown} (n = {len(values)})" if len(values) > 1 else shown}
            aside = 0.05 * (i - (len(curves) - 1) / 2)  # so that error bars do not hide one another
            _errorbar(axes, np.arange(1, len(tasks) + 1) + aside, values, **named, **line_style(i, len(curves)))
        seeds = max(len(values) for values in curves.values())
        axes.set_title(_titled(title, seeds))
        axes.set_ylabel(label)
        if fraction:
            _fraction_axis(axes, everything)
        if zero:
            axes.axhline(0, color=GREY, lw=0.8)
        task_ticks(axes, tasks, first=2 if zero else 1)
        if len(curves) > 1:
            legend_beside(axes)
    return figure


def _task_forgetting_lines(axes: Axes, tasks: Sequence[str], matrices: Matrices) -> None:
    """Each task's forgetting after every later task."""
    values = _stack(matrices)
    count = len(tasks)
    for u in range(count - 1):
        best = np.fmax.accumulate(values[:, u:, u], axis=1)  # (S, T - u)
        drop = np.full((len(values), count), np.nan)
        drop[:, u + 1 :] = best[:, :-1] - values[:, u + 1 :, u]
        if np.isfinite(drop).any():
            _errorbar(
                axes,
                np.arange(1, count + 1),
                drop,
                label=_label(u, tasks[u]),
                **{**line_style(u, count), "lw": 0.9, "alpha": 0.9},
            )


def _errorbar(axes: Axes, x: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """Mean over seeds of ``values`` (S, T), with the standard deviation where there are several."""
    mean, std = _mean_std(values)
    known = np.isfinite(mean)
    spread = std[known] if len(values) > 1 else None
    axes.errorbar(x[known], mean[known], yerr=spread, elinewidth=0.9, **look)


def _mean_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis: mean, and standard deviation with n - 1; NaN where a seed has none."""
    mean = values.mean(axis=0)
    return mean, values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)


def _stack(matrices: Matrices) -> np.ndarray:
    """(S, T, T) float64 with NaN where nothing was measured."""
    arrays = [np.array([[np.nan if v is None else v for v in row] for row in m], dtype=float) for m in matrices]
    _need(bool(arrays) and all(a.ndim == 2 and a.shape == arrays[0].shape for a in arrays), "no accuracy matrix")
    return np.stack(arrays)


def _per_row(matrices: Matrices, measure: Callable[[transfer.Matrix], list[float | None]]) -> np.ndarray:
    """(S, T) of a measure that gives one value a finished task."""
    rows = np.full((len(matrices), len(matrices[0])), np.nan)
    for i, matrix in enumerate(matrices):
        for t, value in enumerate(measure(matrix)):
            rows[i, t] = np.nan if value is None else value
    return rows


def _running_forgetting(matrices: Matrices) -> np.ndarray:
    """(S, T): forgetting as it stood after each task."""

    def running(matrix: transfer.Matrix) -> list[float | None]:
        rows = transfer.finished_rows(matrix)
        return [transfer.forgetting(rows[: t + 1]) if any(v is not None for v in row) else None
                for t, row in enumerate(rows)]  # fmt: skip

    return _per_row(matrices, running)


def _fraction_axis(axes: Axes, values: np.ndarray) -> None:
    """Accuracies up to 1; from 0 unless all are high, where differences would not be seen."""
    low = np.nanmin(values)
    axes.set_ylim(0.0 if low < 0.5 else np.floor((low - 0.03) * 10) / 10, 1.02)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7))


def _titled(title: str, seeds: int) -> str:
    return f"{title}\n(mean ± s.d., {seeds} seeds)" if seeds > 1 else title


def _label(index: int, name: str) -> str:
    """A task's name; numbered unless its name begins so already."""
    return short(name) if name.startswith(f"task{index + 1}") else short(f"{index + 1} {name}")


def _need(condition: object, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


RUN_FIGURES = (
    RunFigure(
        "accuracy_matrix",
        ACCURACY,
        "Row: after training a task. Column: accuracy on a task's validation images.",
        lambda run: accuracy_matrix(run.tasks, [run.matrix], run.method),
        "results.json",
    ),
    RunFigure(
        "forgetting",
        ACCURACY,
        "Drop from the best accuracy a task had before; below zero a later task has helped.",
        lambda run: forgetting(run.tasks, {run.label: [run.matrix]}),
        "results.json",
    ),
    RunFigure(
        "accuracy_vs_task",
        ACCURACY,
        "Each line starts where its task is learned; where it falls, the task is forgotten.",
        lambda run: accuracy_vs_task(run.tasks, [run.matrix]),
        "results.json",
    ),
    RunFigure(
        "average_accuracy",
        ACCURACY,
        "Mean over the tasks seen so far.",
        lambda run: average_accuracy(run.tasks, {run.label: [run.matrix]}),
        "results.json",
    ),
)
