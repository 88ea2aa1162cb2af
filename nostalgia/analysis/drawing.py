"""Which figures a run has, and drawing all that its files allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from matplotlib.figure import Figure

from nostalgia.analysis import figures, figures_curvature, figures_theory, figures_training
from nostalgia.analysis.figure_style import save
from nostalgia.analysis.figures_own import load_figures
from nostalgia.analysis.run_folder import RunFolder, TaskCurvature
from nostalgia.logging.csv_log import Record

Drawer = Callable[[], Figure]


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
    names = run.tasks
    spectra = [as_spectrum(c) for c in run.curvature]
    traces = [c.raw.get("trace") for c in run.curvature]
    measured = "no accuracies"

    def with_matrix(draw: Drawer) -> Drawer:
        return lambda: draw() if run.matrix else _cannot(_why(run, measured, "results.json"))

    return {
        "accuracy_vs_task": with_matrix(lambda: figures.accuracy_vs_task(names, [run.matrix])),
        "forgetting": with_matrix(lambda: figures.forgetting(names, {run.label: [run.matrix]})),
        "average_accuracy": with_matrix(lambda: figures.average_accuracy(names, {run.label: [run.matrix]})),
        "accuracy_matrix": with_matrix(lambda: figures.accuracy_matrix(names, [run.matrix], run.method)),
        "train_loss": lambda: _because(run, "metrics.csv", lambda: figures_training.train_loss(run.metrics)),
        "throughput": lambda: _because(run, "metrics.csv", lambda: figures_training.throughput(run.metrics)),
        "projection": lambda: _because(run, "metrics.csv", lambda: figures_training.projection(run.metrics)),
        "memory": lambda: _because(run, "memory.csv", lambda: figures_training.memory(run.memory)),
        "spectrum": lambda: figures_curvature.spectrum(spectra),
        "curvature_share": lambda: figures_curvature.curvature_share(spectra, traces),
        "importance": lambda: figures_theory.importance(task_shares(run.curvature)),
        "subspace_overlap": lambda: figures_curvature.subspace_overlap(*task_angles(run.curvature)),
        "forgetting_prediction": lambda: figures_theory.forgetting_prediction(by_task(run.forgetting["rows"])),
    }


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


def as_spectrum(curvature: TaskCurvature) -> figures_curvature.Spectrum:
    density = curvature.raw.get("density")
    return figures_curvature.Spectrum(
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


def task_shares(curvature: Sequence[TaskCurvature]) -> list[figures_theory.Shares]:
    """Shares of the parameters of each task whose file has them."""
    found = []
    for c in curvature:
        names, sizes, own, memory = (
            c.raw.get(key) or [] for key in ("parameters", "parameter_sizes", "importance", "memory_importance")
        )
        if names and len(names) == len(sizes) == len(own) and len(memory) in (0, len(names)):
            found.append(figures_theory.Shares(c.task, names, sizes, own, memory))
    return found


def by_task(rows: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    return groups


def _is_density(value: Any) -> TypeGuard[dict[str, list[float]]]:
    return isinstance(value, dict) and {"grid", "density"} <= set(value)


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


def _because(run: RunFolder, file: str, draw: Drawer) -> Figure:
    """``draw``, or the reason why its file could not be read."""
    if file in run.problems:
        raise ValueError(run.problems[file])
    return draw()


def _why(run: RunFolder, reason: str, file: str) -> str:
    return f"{reason}: {run.problems[file]}" if file in run.problems else reason


def _cannot(reason: str) -> Figure:
    raise ValueError(reason)
