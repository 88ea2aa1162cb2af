"""Predicted forgetting within a run: what is kept at the end of a task, and measured after each later one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nostalgia.curvature.eigenspace import task_operator
from nostalgia.curvature.forgetting import ForgettingPrediction
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.curvature.shares import parameter_shares
from nostalgia.data.stream import Batch, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.experiment.setup import Parts, curvature_options
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.models import norm_statistics
from nostalgia.models.backbones import projected_parameters
from nostalgia.parallel.coordination import agree
from nostalgia.reporting.files import write_json
from nostalgia.reporting.run_folder import FORGETTING
from nostalgia.training.task_model import TaskModel, loss_sum


class ForgettingCheck:
    """Holds the loss of each finished task against its prediction; `ForgettingPrediction` is the mathematics.

    ``results/forgetting_prediction.json`` is written anew after each task.
    """

    def __init__(self, parts: Parts, bases: Mapping[str, torch.Tensor], folder: Path) -> None:
        self.parts, self.folder = parts, folder
        config = parts.config
        self.prediction = ForgettingPrediction(
            parts.space, bases, trace_samples=config.nostalgia.trace_samples, seed=config.experiment.seed
        )

    def restore(self, vectors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what the prediction's own `tensors` and `state` gave."""
        self.prediction = ForgettingPrediction.restore(self.parts.space, self.prediction.bases, vectors, state)

    @classmethod
    def wanted(cls, parts: Parts) -> bool:
        """Whether the run predicts forgetting: ``nostalgia.predict_forgetting``."""
        chosen = parts.config.nostalgia.predict_forgetting
        return {"true": True, "false": False}.get(chosen, parts.method.needs_curvature)

    def task_finished(
        self, task: Task, operator: BatchedOperator, pairs: Eigenpairs, warn: Callable[[str], object]
    ) -> None:
        """Measure the earlier tasks and expand this one's loss; its eigenvectors must be in ``bases`` by the next call.

        The parameters and heads are those the task ended with, whole on every rank; all ranks call it.
        """
        indices = {t.name: t.index - 1 for t in self.parts.tasks}
        self.prediction.measure(task.name, self._theta(), lambda name: self.loss(indices[name]))
        try:
            self.prediction.finish(task.name, operator, pairs, self.loss(task.index - 1))
        except RunFailedError as error:  # raised on every rank alike; training does not depend on it
            warn(f"{task.name}: its forgetting will not be predicted: {error}")
        if self.parts.accelerator.is_main_process:
            write_json(self.folder / "results" / FORGETTING, self.prediction.report())

    def loss(self, index: int) -> float:
        """Mean loss of finished task ``index`` (from 0) over its curvature set, at the parameters as they are now.

        Under its own head and, as in evaluation, its own batch-norm statistics.
        """
        parts, smoothing = self.parts, self.parts.config.train.label_smoothing

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
            return loss_sum(model(batch.images), batch, smoothing), len(batch)

        # The parameters are whole here: a loss takes one plain pass, whatever way products are taken.
        options = dataclasses.replace(curvature_options(parts.config), method="exact", compile=False)
        model = TaskModel(parts.backbone, [parts.heads[index]])
        own = parts.norm_statistics[index] if parts.config.model.norm_statistics == "per_task" else None
        with norm_statistics.using(parts.backbone, own):
            return task_operator(
                model,
                loss_fn,
                self._batches(parts.tasks[index]),
                self._parameters(),
                parts.accelerator,
                options,
                parts.space,
            ).loss()

    def _batches(self, task: Task) -> list[Batch]:
        """The task's curvature set, this rank's share: the same samples each time."""
        parts, config = self.parts, self.parts.config
        images = parts.loader([task], train=True).images
        return agree(
            parts.accelerator,
            lambda: curvature_batches(
                images,
                parts.view,
                name=task.name,
                num_samples=config.nostalgia.num_samples,
                batch_size=config.nostalgia.batch_size,
                seed=config.experiment.seed,
                rank=parts.accelerator.process_index,
                world_size=parts.accelerator.num_processes,
            ),
        )

    def _parameters(self) -> dict[str, nn.Parameter]:
        available = projected_parameters(self.parts.backbone, self.parts.config.nostalgia.project_params)
        return {name: available[name] for name in self.parts.projected}

    def _theta(self) -> torch.Tensor:
        return self.parts.space.take(p.detach() for p in self._parameters().values())


def directions(parts: Parts, pairs: Eigenpairs, check: ForgettingCheck | None, task: str) -> dict[str, Any]:
    """For curvature/task<i>.json: where in the network a task's directions and the memory's lie, and the trace."""
    memory, space = parts.memory, pairs.space
    found: dict[str, Any] = {
        "parameters": list(space.names),
        "parameter_sizes": list(space.layout.numels),
        "importance": parameter_shares(pairs.eigenvectors, pairs.eigenvalues, space),
    }
    if memory.basis is not None and memory.space is not None:
        found["memory_importance"] = parameter_shares(memory.basis, memory.eigenvalues, memory.space)
    expansion = None if check is None else check.prediction.expansions.get(task)
    return found if expansion is None else {**found, "trace": expansion.trace, "trace_error": expansion.rest_error}
