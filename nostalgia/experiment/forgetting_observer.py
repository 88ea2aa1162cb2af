"""Predicted forgetting of a run: the loss of finished tasks is held against what their curvature foretold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nostalgia.curvature.eigenspace import task_operator
from nostalgia.curvature.forgetting import Expansion, ForgettingPrediction
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.experiment.components import Components, curvature_options
from nostalgia.experiment.context import curvature_samples
from nostalgia.experiment.saved_curvature import SavedBases, SavedFactors
from nostalgia.linalg.block import Block
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.models import norm_statistics
from nostalgia.models.heads import copy_head, head_with
from nostalgia.models.task_model import TaskModel
from nostalgia.reporting.files import write_json
from nostalgia.reporting.run_folder import FORGETTING


class ForgettingObserver:
    """Writes ``results/forgetting_prediction.json``. The parameters and heads are those a task ended with, whole on every
    rank; all ranks call every method together."""

    def __init__(
        self, run: Components, folder: Path, warn: Callable[[str], None], bases: SavedBases, factors: SavedFactors
    ) -> None:
        self.run, self.folder, self.warn = run, folder, warn
        options, seed = run.config.analysis, run.config.experiment.seed
        self.prediction = ForgettingPrediction(
            run.space, bases, factors, trace_samples=options.trace_samples, seed=seed
        )
        self._heads: dict[str, dict[str, Tensor]] = {}  # of each task, as it ended

    @property
    def expansions(self) -> Mapping[str, Expansion]:
        return self.prediction.expansions

    def model(self, task: Task) -> TaskModel:
        """The backbone as it is now under the head that ``task`` ended with."""
        ended = self._heads.get(task.name)
        return TaskModel(self.run.backbone, [self.run.heads[task.head] if ended is None else head_with(ended)])

    def operator(self, task: Task, hvp: str) -> BatchedOperator:
        """The curvature of ``task`` over its curvature samples, at the parameters as they are now."""
        run = self.run
        options = curvature_options(run.config)
        if hvp != options.hvp:
            options = dataclasses.replace(options, hvp=hvp, compile=False)
        samples = curvature_samples(run, [task], options.num_samples)
        return task_operator(
            self.model(task), run.objective, samples, run.scope_parameters(), run.accelerator, options, run.space
        )

    def measure(self, task: Task) -> None:
        """Hold the tasks before ``task`` against their predictions."""
        run = self.run
        by_name = {t.name: t for t in run.tasks}
        theta = run.space.take(p.detach() for p in run.scope_parameters().values())
        self.prediction.measure(task.name, theta, lambda name: self._loss(by_name[name]))
        self._write()

    def predict(self, task: Task, operator: BatchedOperator, pairs: Eigenpairs | None) -> None:
        """Hold the earlier tasks against their predictions, and expand the loss of ``task``, which has just ended."""
        self._heads[task.name] = copy_head(self.run.heads[task.head])
        self.measure(task)
        try:
            self.prediction.finish(task.name, operator, pairs, self._loss(task))
        except RunFailedError as error:  # raised on every rank alike; training does not depend on it
            self.warn(f"{task.name}: its forgetting will not be predicted: {error}")
        self._write()

    def state(self) -> dict[str, Any]:
        """For the checkpoint's codec."""
        return {
            "prediction": self.prediction.state(),
            "vectors": {task: Block(rows, self.run.space) for task, rows in self.prediction.vectors.items()},
            "heads": self._heads,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._heads = {name: dict(head) for name, head in state["heads"].items()}
        self.prediction.load_state(state["prediction"], {task: block.rows for task, block in state["vectors"].items()})

    def _write(self) -> None:
        if self.run.accelerator.is_main_process:
            write_json(self.folder / "results" / FORGETTING, self.prediction.report())

    def _loss(self, task: Task) -> float:
        """Mean loss of a finished task over its curvature set, at the parameters as they are now.

        Under its own head as the task ended, and, as in evaluation, its own batch-norm statistics.
        """
        run = self.run
        own = run.norm_statistics[task.index - 1] if run.config.model.norm_statistics == "per_task" else None
        with norm_statistics.using(run.backbone, own):
            # The parameters are whole here: a loss takes one plain pass, whatever way products are taken.
            return self.operator(task, "exact").loss()
