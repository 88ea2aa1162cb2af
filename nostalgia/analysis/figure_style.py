"""How figures look: sizes, colours that also read in grey, names of tasks that fit, and saving them whole."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from nostalgia.utils.files import write_atomic

DPI = 200
GREY = "0.45"
NAMED_LINES = 10  # more lines than these get a scale of colours instead of a legend
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
}


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for the figures drawn within."""
    with mpl.rc_context(STYLE):
        yield


def new_figure(width: float = 5.6, height: float = 3.6) -> Figure:
    """An empty figure in inches, laid out so that nothing overlaps; independent of any display."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.06, h_pad=0.06, wspace=0.04)  # type: ignore[call-arg]
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure with its letters as outlines: the same on every machine, whatever fonts it has."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "nostalgia"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Write ``figure`` as a PNG, whole or not at all."""
    write_atomic(path, png(figure))
    return path


def sequential(count: int) -> list[Any]:
    """``count`` colours from dark to light, apart in grey too; one colour is dark blue."""
    colormap = mpl.colormaps["viridis"]
    return [colormap(0.82 * i / max(count - 1, 1)) for i in range(count)]


def line_style(index: int, count: int) -> dict[str, Any]:
    """Colour, marker and dashes of line ``index`` of ``count``; many lines are told apart by colour alone."""
    color = sequential(count)[index]
    if count > NAMED_LINES:
        return {"color": color, "marker": ".", "ls": "-", "lw": 0.9, "ms": 3.5}
    return {"color": color, "marker": MARKERS[index], "ls": DASHES[index % len(DASHES)]}


def key_beside(axes: Axes, count: int, title: str, also: Sequence[str] = ()) -> None:
    """What the lines of ``count`` numbered things are: a legend, or a scale of colours where they are many.

    ``also``: labels of further lines, which keep a legend of their own then.
    """
    if count <= NAMED_LINES:
        legend_beside(axes, title)
        return
    colors = ListedColormap(sequential(count))
    scale = ScalarMappable(BoundaryNorm(np.arange(0.5, count + 1), count), colors)
    bar = axes.figure.colorbar(scale, ax=axes, aspect=26, pad=0.02)
    bar.set_ticks([1, *range(5, count + 1, 5)], minor=False)
    bar.set_label(title)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0)
    handles, labels = axes.get_legend_handles_labels()
    kept = [i for i, label in enumerate(labels) if label in also]
    if kept:
        axes.legend([handles[i] for i in kept], [labels[i] for i in kept], loc="best")


def text_color(rgba: Sequence[float]) -> str:
    """Black or white, whichever reads on ``rgba`` (relative luminance, WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def short(name: str, limit: int = 18) -> str:
    """``name`` in at most ``limit`` characters, its middle left out: both ends tell tasks apart.

    A dollar sign stays one: matplotlib would read what stands between two as mathematics.
    """
    if len(name) > limit:
        tail = (limit - 1) // 2
        name = f"{name[: limit - 1 - tail]}…{name[-tail:]}"
    return name.replace("$", r"\$")


def task_ticks(axes: Axes, tasks: Sequence[str], *, first: int = 1, limit: int = 14) -> None:
    """Name the tasks ``first``..T under the x axis where there is room, else number some of them."""
    axes.set_xlim(first - 0.4, max(len(tasks), 1) + 0.4)
    if len(tasks) > 8:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("after training task (number)")
        return
    axes.xaxis.set_major_locator(FixedLocator(list(range(first, len(tasks) + 1))))
    names = [short(name, limit) for name in tasks[first - 1 :]]
    crowded = sum(map(len, names)) > 52
    axes.set_xticklabels(names, rotation=25 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlabel("after training task")


def legend_beside(axes: Axes, title: str | None = None, *, columns: int = 1) -> None:
    """Legend to the right of the axes: it hides no data whatever the curves do."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            title=title,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            ncols=columns,
            borderaxespad=0.0,
            handlelength=2.6,
            alignment="left",
        )
