"""Figures of what happened while training: loss and memory. Interface as in `figures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nostalgia.analysis.figure_style import (
    GREY,
    MARKERS,
    legend_beside,
    new_figure,
    sequential,
    short,
    style,
)
from nostalgia.analysis.run_figure import TRAINING, RunFigure
from nostalgia.logging.csv_log import Record


def train_loss(metrics: Sequence[Record]) -> Figure:
    """Training loss of each logged step, its moving average, and the validation loss after each epoch."""
    train = _points(metrics, "train", "loss")
    warmup = _points(metrics, "warmup", "loss")
    if not len(train):
        raise ValueError("metrics.csv holds no training loss")
    with style():
        figure = new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        segments = _by_task(metrics, ("train", "warmup"))
        _training_lines(axes, metrics, [name for name, _, _ in segments])
        if len(warmup):
            axes.plot(warmup[:, 0], warmup[:, 1], ls="", marker=".", ms=3, color=GREY, label="head warm-up")
        validation = _points(metrics, "val", "loss")
        if len(validation):
            look: dict[str, Any] = {
                "ls": "",
                "marker": "D",
                "ms": 3.2,
                "mfc": "white",
                "mec": "black",
                "mew": 0.8,
            }
            axes.plot(validation[:, 0], validation[:, 1], label="validation", **look)
        shown = np.concatenate([part[:, 1] for part in (train, warmup, validation) if len(part)])
        if shown.min() > 0 and shown.max() > 100 * shown.min():
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, shown.min()))
        mark_tasks(axes, segments)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("cross-entropy (nats a sample)")
        axes.set_title("Loss", pad=_title_pad(segments))
        legend_beside(axes)
    return figure


def memory(rows: Sequence[Record]) -> Figure:
    """Memory of each rank over time; the GPU's in a panel of its own where there is one."""
    kinds = {
        "cpu_mem_mb": "Resident memory of the process",
        "gpu_mem_mb": "GPU memory, peak since the last point",
    }
    shown = [kind for kind in kinds if any((row.get(kind) or 0) > 0 for row in rows)]
    if not shown:
        raise ValueError("memory.csv holds no measurement")
    start = min(row["time"] for row in rows if row.get("time") is not None)
    ranks = sorted({int(row.get("rank") or 0) for row in rows})
    span = max(row["time"] for row in rows if row.get("time") is not None) - start
    unit, scale = ("minutes", 60.0) if span >= 120 else ("seconds", 1.0)
    with style():
        figure = new_figure(6.4, 1.2 + 2.3 * len(shown))
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, kind in zip(panels, shown, strict=True):
            for i, rank in enumerate(ranks):
                own = [row for row in rows if int(row.get("rank") or 0) == rank and row.get(kind) is not None]
                x = [(row["time"] - start) / scale for row in own]
                y = [row[kind] / 1024 for row in own]
                look = {"color": sequential(len(ranks))[i], "marker": MARKERS[i % len(MARKERS)]}
                axes.plot(x, y, label=f"rank {rank}", markevery=max(1, len(x) // 12), ls=_dash(i), **look)
            axes.set_ylim(0, 1.12 * max(row[kind] for row in rows if row.get(kind) is not None) / 1024)
            axes.set_ylabel("GiB")
            axes.set_title(kinds[kind])
        panels[-1].set_xlabel(f"time since the start ({unit})")
        legend_beside(panels[0], columns=1 if len(ranks) <= 8 else 2)
    return figure


def projection(metrics: Sequence[Record]) -> Figure:
    """What the projection removed of the gradient at each logged step, and the leak after each epoch."""
    removed = _points(metrics, "train", "projected_fraction")
    leak = np.concatenate([_points(metrics, "train", "leak"), _points(metrics, "val", "leak")])
    leak = leak[np.argsort(leak[:, 0], kind="stable")]
    parts = [part for part in (removed, leak) if len(part)]
    if not parts:
        raise ValueError("no step of the run was projected")
    segments = _by_task(metrics, ("train", "warmup"))
    with style():
        figure = new_figure(6.4, 1.3 + 1.9 * len(parts))
        panels = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0])
        if len(removed):
            axes = panels[0]
            axes.plot(removed[:, 0], removed[:, 1], ".", ms=3, color=sequential(2)[0])
            axes.set_ylim(bottom=0)
            axes.set_ylabel("share of |g|²")
            axes.set_title("Projected fraction: removed from the gradient", pad=_title_pad(segments))
            mark_tasks(axes, segments)
        if len(leak):
            axes = panels[-1]
            positive = leak[:, 1] > 0
            axes.plot(leak[positive, 0], leak[positive, 1], "D", ms=3.5, color=sequential(2)[0])
            if positive.any():
                axes.set_yscale("log")
            axes.set_ylabel("|Qᵀd| / |d|")
            axes.set_title("Leak: displacement within the memory's span", pad=None if len(removed) else 14)
            mark_tasks(axes, segments, names=not len(removed))
        panels[-1].set_xlabel("optimizer step")
    return figure


def throughput(metrics: Sequence[Record]) -> Figure:
    """Images a second over all ranks, at each logged step."""
    rate = _points(metrics, "train", "images_per_s")
    if not len(rate):
        raise ValueError("metrics.csv holds no images_per_s")
    segments = _by_task(metrics, ("train", "warmup"))
    with style():
        figure = new_figure(6.4, 3.0)
        axes = figure.add_subplot()
        axes.plot(rate[:, 0], rate[:, 1], ".", ms=3, color=sequential(2)[0])
        axes.set_ylim(0, 1.1 * rate[:, 1].max())
        mark_tasks(axes, segments)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("images / s, all ranks")
        axes.set_title("Throughput", pad=_title_pad(segments))
    return figure


def mark_tasks(axes: Axes, segments: Sequence[tuple[str, float, float]], names: bool = True) -> None:
    """A line where each task begins, and its name above, numbers where names would not fit."""
    if not segments:
        return
    first, last = segments[0][1], segments[-1][2]
    axes.set_xlim(first - 0.01 * (last - first) - 0.5, last + 0.01 * (last - first) + 0.5)
    for i, (name, start, end) in enumerate(segments):
        if i:
            axes.axvline(start, color=GREY, lw=0.7, ls=(0, (1, 2)))
        room = int(62 * (end - start) / max(last - first, 1))
        label = short(name, room) if room >= 9 else str(i + 1)
        if names and (room >= 2 or len(segments) == 1):
            place = ((start + end) / 2, 1.01)
            axes.text(*place, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=7, color="0.3")


def _title_pad(segments: Sequence[object]) -> float | None:
    return 16.0 if segments else None


def _training_lines(axes: Axes, metrics: Sequence[Record], tasks: Sequence[str]) -> None:
    """Each task's training loss and its moving average, on its own: a new task's loss is no continuation."""
    labels = ["training, as logged", "training, moving average"]
    for name in tasks:
        own = _points([row for row in metrics if row.get("task") == name], "train", "loss")
        if not len(own):
            continue
        axes.plot(own[:, 0], own[:, 1], color="0.72", lw=0.7, label=labels[0])
        axes.plot(own[:, 0], _moving_average(own[:, 1]), color=sequential(2)[0], lw=1.6, label=labels[1])
        labels = ["_", "_"]


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over a fifteenth of the points, over fewer at the ends."""
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _points(metrics: Sequence[Record], split: str, name: str) -> np.ndarray:
    """(n, 2): step and value, of the finite values in the rows of ``split``."""
    pairs = [(row["step"], row[name]) for row in metrics if row.get("split") == split and row.get(name) is not None]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _by_task(metrics: Sequence[Record], splits: tuple[str, ...]) -> list[tuple[str, float, float]]:
    """Name, first and last logged step of each task, in order; a task begins where the one before ended."""
    spans: dict[str, list[float]] = {}
    for row in metrics:
        if row.get("split") in splits and row.get("task"):
            spans.setdefault(row["task"], []).append(row["step"])
    segments: list[tuple[str, float, float]] = []
    for name, steps in spans.items():
        start = segments[-1][2] if segments else min(steps)
        segments.append((name, start, max(steps)))
    return segments


def _dash(index: int) -> str:
    return ("-", "--", "-.", ":")[index % 4]


RUN_FIGURES = (
    RunFigure(
        "train_loss",
        TRAINING,
        "A line for each task; the warm-up trains the new head alone.",
        lambda run: train_loss(run.metrics),
        "metrics.csv",
    ),
    RunFigure(
        "projection",
        TRAINING,
        "The gradient's share that was removed, and the displacement's that is left in the memory's span.",
        lambda run: projection(run.metrics),
        "metrics.csv",
    ),
    RunFigure(
        "throughput",
        TRAINING,
        "Images per second over all ranks, between logged steps.",
        lambda run: throughput(run.metrics),
        "metrics.csv",
    ),
    RunFigure("memory", TRAINING, "Of each rank.", lambda run: memory(run.memory), "memory.csv"),
)
