"""A figure of one run as its family's file declares it: name, section and caption in the report, the file it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from nostalgia.analysis.run_folder import RunFolder
from nostalgia.logging.results import RESULTS

ACCURACY, PREDICTED, CURVATURE, TRAINING = (
    "Accuracy",
    "Forgetting, predicted and measured",
    "Curvature",
    "Training",
)  # sections of the report


@dataclass(frozen=True)
class RunFigure:
    """Called with a run's folder it draws the figure; ValueError says why it cannot.

    A family's file lists its figures in ``RUN_FIGURES``, in the order of the report: nothing else need know a new one.
    """

    name: str  # of the file, without its ending
    section: str
    caption: str
    draw: Callable[[RunFolder], Figure]
    needs: str = ""  # the run's file that it is drawn from

    def __call__(self, run: RunFolder) -> Figure:
        problem = run.problems.get(self.needs)
        if self.needs == RESULTS:  # the accuracies may be had from another file
            if not run.matrix:
                raise ValueError(f"no accuracies: {problem}" if problem else "no accuracies")
        elif problem:
            raise ValueError(problem)
        return self.draw(run)
