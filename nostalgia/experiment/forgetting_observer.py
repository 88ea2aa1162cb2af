"""Predicted forgetting of a run: the loss of finished tasks is held against what their curvature foretold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nostalgia.curvature.forgetting import Expansion, ForgettingPrediction
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.experiment.components import Components
from nostalgia.experiment.saved_curvature import SavedBlocks, SavedFactors
from nostalgia.experiment.task_losses import TaskLosses
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.logging.results import FORGETTING
from nostalgia.utils.files import write_json


class ForgettingObserver:
    """Writes ``results/forgetting_prediction.json``. The parameters and heads are those a task ended with, whole on every
    rank; all ranks call every method together.

    Where adapters are merged after each task the loss is expanded in the weights of the adapted layers (`TaskLosses`), with
    Kronecker factors alone.
    """

    def __init__(
        self, run: Components, folder: Path, warn: Callable[[str], None], bases: SavedBlocks, factors: SavedFactors
    ) -> None:
        self.run, self.folder, self.warn = run, folder, warn
        k, size = run.config.analysis.top_k, run.space.size
        if run.config.analysis.predict_forgetting == "true" and k > size:
            raise UsageError(f"analysis.top_k={k}: allowed is 1 to {size}, the number of parameters in scope")
        self.losses = TaskLosses(run)
        space = self.losses.space
        self.methods_factors = factors
        self.factors = SavedFactors(folder, space, "_loss_factors.safetensors")
        self.vectors = SavedBlocks(run, folder, space, "_expansion.safetensors")
        self.prediction = ForgettingPrediction(
            space,
            bases,
            self.factors,
            self.vectors,
            trace_samples=run.config.analysis.trace_samples,
            seed=run.config.experiment.seed,
        )

    @property
    def expansions(self) -> Mapping[str, Expansion]:
        return self.prediction.expansions

    def measure(self, task: Task) -> None:
        """Hold the tasks before ``task`` against their predictions."""
        by_name = {t.name: t for t in self.run.tasks}
        losses = self.losses

        def form_of(name: str, end: Tensor, d: Tensor) -> float | None:
            try:
                return losses.form(by_name[name], end, d)
            except RunFailedError as error:  # raised on every rank alike; training does not depend on it
                self.warn(f"{name}: no exact second order after {task.name}: {error}")
                return None

        exact = form_of if self.run.config.analysis.exact_second_order else None
        self.prediction.measure(task.name, losses.position(), lambda name: losses.loss(by_name[name]), exact)
        self._write()

    def predict(
        self, task: Task, operator: BatchedOperator, pairs: Eigenpairs | None, factors: KroneckerFactors | None
    ) -> None:
        """Hold the earlier tasks against their predictions, and expand the loss of ``task``, which has just ended.

        ``operator`` is that of the parameters in scope; ``pairs`` and ``factors`` are the method's, of which what fits is used.
        """
        losses = self.losses
        losses.ended(task)
        self.measure(task)
        try:
            if losses.in_weights:
                operator, pairs = losses.weights_operator(task), None
            if factors is not None and factors.temperature == 1.0 and not losses.in_weights:
                self.factors.files[task.name] = self.methods_factors.files[task.name]
            elif (
                factors is not None or losses.in_weights
            ):  # the method's, if softened, are not the curvature of the loss
                self.factors.save(task, losses.factors(operator))
            self.prediction.finish(task.name, operator, pairs, losses.loss(task))
        except RunFailedError as error:  # raised on every rank alike; training does not depend on it
            self.warn(f"{task.name}: its forgetting will not be predicted: {error}")
        self._write()

    def state(self) -> dict[str, Any]:
        """For the checkpoint's codec."""
        return {
            "prediction": self.prediction.state(),
            "vectors": self.vectors.files,
            "factors": self.factors.files,
            "heads": self.losses.heads,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.losses.heads = {name: dict(head) for name, head in state["heads"].items()}
        self.vectors.files, self.factors.files = dict(state["vectors"]), dict(state["factors"])
        self.prediction.load_state(state["prediction"])

    def _write(self) -> None:
        if self.run.accelerator.is_main_process:
            write_json(self.folder / "results" / FORGETTING, self.prediction.report())
