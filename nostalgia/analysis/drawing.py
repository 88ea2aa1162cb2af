"""Which figures a run has, and drawing all that its files allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from nostalgia.analysis import figures, figures_curvature, figures_theory, figures_training
from nostalgia.analysis.figure_style import save
from nostalgia.analysis.figures_own import load_figures
from nostalgia.analysis.run_figure import RunFigure
from nostalgia.analysis.run_folder import RunFolder

Drawer = Callable[[], Figure]

RUN_FIGURES: tuple[RunFigure, ...] = (
    *figures.RUN_FIGURES,
    *figures_training.RUN_FIGURES,
    *figures_curvature.RUN_FIGURES,
    *figures_theory.RUN_FIGURES,
)
CAPTIONS = {figure.name: figure.caption for figure in RUN_FIGURES}


@dataclass
class Drawn:
    """Paths of the figures that were made, and why the others could not be, by name."""

    made: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def draw_run(run: RunFolder, folder: Path, own: Sequence[str] = ()) -> Drawn:
    """Draw every figure of ``run`` into ``folder``; what its files do not allow is skipped.

    ``own``: functions of the user's as ``module:function``, drawn too.
    """
    drawers = run_drawers(run)
    figures = {figure.name: partial(figure.draw, run) for figure in load_figures(own, drawers)}
    return _draw({**drawers, **figures}, folder)


def draw_comparison(methods: Mapping[str, Sequence[RunFolder]], folder: Path) -> Drawn:
    """Draw what compares methods (name -> runs with different seeds) over the same tasks."""
    return _draw(comparison_drawers(methods), folder)


def run_drawers(run: RunFolder) -> dict[str, Drawer]:
    """By name, the functions that draw the figures of ``run``; they raise ValueError where they cannot."""
    return {figure.name: partial(figure, run) for figure in RUN_FIGURES}


def comparison_drawers(methods: Mapping[str, Sequence[RunFolder]]) -> dict[str, Drawer]:
    """As `run_drawers`, for methods side by side; all runs must have the same tasks."""
    matrices = {name: [run.matrix for run in runs] for name, runs in methods.items()}
    names = next(iter(methods.values()))[0].tasks
    drawers: dict[str, Drawer] = {
        "average_accuracy": lambda: figures.average_accuracy(names, matrices),
        "forgetting": lambda: figures.forgetting(names, matrices),
    }
    for name, own in matrices.items():
        drawers[f"accuracy_matrix_{name}"] = lambda name=name, own=own: figures.accuracy_matrix(names, own, name)  # type: ignore[misc]
    return drawers


def _draw(drawers: Mapping[str, Drawer], folder: Path) -> Drawn:
    drawn = Drawn()
    for name, draw in drawers.items():
        try:
            figure = draw()
        except ValueError as error:
            drawn.skipped[name] = str(error)
            continue
        drawn.made[name] = save(figure, folder / f"{name}.png")
    return drawn
