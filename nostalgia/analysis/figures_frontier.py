"""The frontier as a picture: learning accuracy against final accuracy and against forgetting, one curve a method."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from nostalgia.analysis.frontier import BASELINE, MARGIN, Frontier, Point

CAPTION = (
    "A curve a method over its strengths, bars of a standard error over seeds. Right of the dotted line learning accuracy is "
    "within half a point of fine-tuning's."
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")
DASHES = ("-", "--", "-.", ":")


def frontier_figure(found: Frontier) -> Figure:
    """Markers and dashes differ, so that it reads in grey; bars are standard errors over seeds."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    methods = list(dict.fromkeys(point.method for point in found.points))
    baseline = next((p for p in found.points if p.method == BASELINE), None)
    for number, method in enumerate(methods):
        points = sorted((p for p in found.points if p.method == method), key=lambda p: p.strength or 0.0)
        style = {
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number // 3 % len(DASHES)],
            "markersize": 5,
            "linewidth": 1.2,
            "capsize": 2,
        }
        for axis, name in zip(axes, ("acc", "bwt"), strict=True):
            x, y = (_column(points, column) for column in ("learning_accuracy", name))
            spread = [p.error[name] or 0.0 for p in points]
            axis.errorbar(x, y, yerr=spread, label=method if axis is axes[0] else None, **style)
    for axis, title in zip(axes, ("final accuracy (ACC)", "backward transfer (BWT)"), strict=True):
        axis.set_xlabel("learning accuracy (LA)")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if baseline is not None and baseline.mean["learning_accuracy"] is not None:
            axis.axvline(baseline.mean["learning_accuracy"] - MARGIN, color="0.4", linewidth=0.8, linestyle=":")
    figure.legend(loc="outside lower center", ncols=min(6, max(1, len(methods))), fontsize="small", frameon=False)
    return figure


def _column(points: Sequence[Point], name: str) -> list[float]:
    return [float("nan") if p.mean[name] is None else float(p.mean[name] or 0.0) for p in points]
