"""Predicted forgetting of a run: the loss of finished tasks is held against what their curvature foretold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nostalgia.curvature.eigenspace import task_operator
from nostalgia.curvature.forgetting import Expansion, ForgettingPrediction
from nostalgia.curvature.kronecker import KroneckerFactors, kronecker_factors
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.experiment.components import Components, curvature_options, make_space
from nostalgia.experiment.context import curvature_samples
from nostalgia.experiment.saved_curvature import SavedBlocks, SavedFactors
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models import norm_statistics
from nostalgia.models.adapters import adapted_weights, effective_weights, merged
from nostalgia.models.heads import copy_head, head_with
from nostalgia.models.task_model import TaskModel
from nostalgia.reporting.files import write_json
from nostalgia.reporting.run_folder import FORGETTING


class ForgettingObserver:
    """Writes ``results/forgetting_prediction.json``. The parameters and heads are those a task ended with, whole on every
    rank; all ranks call every method together.

    Where adapters are merged after each task, the network's movement does not show in their coordinates: there the weights
    of the adapted layers are what the loss is expanded in, with Kronecker factors alone (``weights``).
    """

    def __init__(
        self, run: Components, folder: Path, warn: Callable[[str], None], bases: SavedBlocks, factors: SavedFactors
    ) -> None:
        self.run, self.folder, self.warn = run, folder, warn
        self.weights = run.merges_adapters
        self.space = run.space
        if self.weights:
            self.space = make_space(adapted_weights(run.backbone), run.accelerator, run.space.dtype)
        self.methods_factors = factors
        self.factors = SavedFactors(folder, self.space, "_loss_factors.safetensors")
        self.vectors = SavedBlocks(run, folder, self.space, "_expansion.safetensors")
        self.prediction = ForgettingPrediction(
            self.space,
            bases,
            self.factors,
            self.vectors,
            trace_samples=run.config.analysis.trace_samples,
            seed=run.config.experiment.seed,
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
        return self._operator(task, self.model(task), self.run.scope_parameters(), self.run.space, hvp)

    def measure(self, task: Task) -> None:
        """Hold the tasks before ``task`` against their predictions."""
        run = self.run
        by_name = {t.name: t for t in run.tasks}
        now = effective_weights(run.backbone) if self.weights else run.scope_parameters()
        theta = self.space.take(p.detach() for p in now.values())
        self.prediction.measure(task.name, theta, lambda name: self._loss(by_name[name]))
        self._write()

    def predict(
        self, task: Task, operator: BatchedOperator, pairs: Eigenpairs | None, factors: KroneckerFactors | None
    ) -> None:
        """Hold the earlier tasks against their predictions, and expand the loss of ``task``, which has just ended.

        ``operator`` is that of the parameters in scope; ``pairs`` and ``factors`` are the method's, of which what fits is used.
        """
        self._heads[task.name] = copy_head(self.run.heads[task.head])
        self.measure(task)
        try:
            if self.weights:
                operator, pairs = self._weights_operator(task), None
            if factors is not None and factors.temperature == 1.0 and not self.weights:
                self.factors.files[task.name] = self.methods_factors.files[task.name]
            elif factors is not None or self.weights:  # the method's, if softened, are not the curvature of the loss
                self.factors.save(task, self._loss_factors(operator))
            self.prediction.finish(task.name, operator, pairs, self._loss(task))
        except RunFailedError as error:  # raised on every rank alike; training does not depend on it
            self.warn(f"{task.name}: its forgetting will not be predicted: {error}")
        self._write()

    def state(self) -> dict[str, Any]:
        """For the checkpoint's codec."""
        return {
            "prediction": self.prediction.state(),
            "vectors": self.vectors.files,
            "factors": self.factors.files,
            "heads": self._heads,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._heads = {name: dict(head) for name, head in state["heads"].items()}
        self.vectors.files, self.factors.files = dict(state["vectors"]), dict(state["factors"])
        self.prediction.load_state(state["prediction"])

    def _weights_operator(self, task: Task) -> BatchedOperator:
        """The curvature of ``task`` in the weights of the adapted layers, the adapters added into them."""
        backbone = merged(self.run.backbone)
        weights = {name: backbone.get_parameter(name) for name in self.space.names}
        return self._operator(task, TaskModel(backbone, list(self.model(task).heads)), weights, self.space, "exact")

    def _operator(
        self, task: Task, model: TaskModel, parameters: Mapping[str, nn.Parameter], space: VectorSpace, hvp: str
    ) -> BatchedOperator:
        run = self.run
        options = curvature_options(run.config)
        if hvp != options.hvp:
            options = dataclasses.replace(options, hvp=hvp, compile=False)
        samples = curvature_samples(run, [task], options.num_samples)
        return task_operator(model, run.objective, samples, parameters, run.accelerator, options, space)

    def _loss_factors(self, operator: BatchedOperator) -> KroneckerFactors:
        """Kronecker factors of the loss itself, over the samples of its operator."""
        return kronecker_factors(
            operator.model,
            self.run.objective.forward_fn,
            operator.batches,
            dict(zip(self.space.names, operator.parameters.values(), strict=True)),
            self.run.accelerator,
            seed=self.run.config.experiment.seed,
            precision=operator.precision,
            space=self.space,
        )

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
