"""The losses of finished tasks, as they are now, and their curvature."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nostalgia.curvature.eigenspace import task_operator
from nostalgia.curvature.kronecker import KroneckerFactors, kronecker_factors
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.tasks import Task
from nostalgia.experiment.components import Components
from nostalgia.experiment.context import curvature_samples
from nostalgia.experiment.method_choice import curvature_options
from nostalgia.experiment.network import make_space
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models import norm_statistics
from nostalgia.models.adapters import adapted_weights, effective_weights, merged
from nostalgia.models.heads import copy_head, head_with
from nostalgia.models.task_model import TaskModel


class TaskLosses:
    """Losses of finished tasks over their curvature samples, each under the head it ended with.

    The coordinates are those of ``space``: the parameters in scope or, where adapters are merged after each task
    (``in_weights``), the weights of the adapted layers, since the network's movement does not show in the adapters'. All
    ranks call every method together, with whole parameters.
    """

    def __init__(self, run: Components) -> None:
        self.run = run
        self.in_weights = run.merges_adapters
        self.space = run.space
        if self.in_weights:
            self.space = make_space(adapted_weights(run.backbone), run.accelerator, run.space.dtype)
        self.heads: dict[str, dict[str, Tensor]] = {}  # of each task, as it ended

    def ended(self, task: Task) -> None:
        """Keep the head that ``task`` has just ended with."""
        self.heads[task.name] = copy_head(self.run.heads[task.head])

    def position(self) -> Tensor:
        """The network's present coordinates (P_local,) in ``space``."""
        now = effective_weights(self.run.backbone) if self.in_weights else self.run.scope_parameters()
        return self.space.take(p.detach() for p in now.values())

    def model(self, task: Task) -> TaskModel:
        """The backbone as it is now under the head that ``task`` ended with."""
        ended = self.heads.get(task.name)
        return TaskModel(self.run.backbone, [self.run.heads[task.head] if ended is None else head_with(ended)])

    def operator(self, task: Task, hvp: str) -> BatchedOperator:
        """The curvature of ``task`` over its curvature samples, at the parameters as they are now."""
        return self._operator(task, self.model(task), self.run.scope_parameters(), self.run.space, hvp)

    def loss(self, task: Task) -> float:
        """Mean loss of a finished task over its curvature set, at the parameters as they are now.

        Under its own head as the task ended and, as in evaluation, its own batch-norm statistics.
        """
        with norm_statistics.using(self.run.backbone, self._norm_statistics(task)):
            # The parameters are whole here: a loss takes one plain pass, whatever way products are taken.
            return self.operator(task, "exact").loss()

    def form(self, task: Task, end: Tensor, d: Tensor) -> float:
        """d.Cd of ``d`` (P_local,), with the task's curvature C where it ended, at the coordinates ``end`` (P_local,)."""
        model, parameters = self._copy(task)
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), self.space.gather(end), strict=True):
                parameter.copy_(value)
        hvp = "exact" if self.in_weights else self.run.config.curvature.hvp
        with norm_statistics.using(model.backbone, self._norm_statistics(task)):
            product = self._operator(task, model, parameters, self.space, hvp).matvec(d)
        return float(self.space.dot(d, product))

    def weights_operator(self, task: Task) -> BatchedOperator:
        """The curvature of ``task`` in the weights of the adapted layers, the adapters added into them."""
        model, weights = self._copy(task)
        return self._operator(task, model, weights, self.space, "exact")

    def factors(self, operator: BatchedOperator) -> KroneckerFactors:
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

    def _copy(self, task: Task) -> tuple[TaskModel, dict[str, nn.Parameter]]:
        """A copy of the network under the task's head, and its parameters that are the coordinates."""
        backbone = merged(self.run.backbone) if self.in_weights else copy.deepcopy(self.run.backbone)
        parameters = {name: backbone.get_parameter(name) for name in self.space.names}
        return TaskModel(backbone, list(self.model(task).heads)), parameters

    def _norm_statistics(self, task: Task) -> dict[str, Tensor] | None:
        """Its own, where each task has its own."""
        run = self.run
        return run.norm_statistics[task.index - 1] if run.config.model.norm_statistics == "per_task" else None

    def _operator(
        self, task: Task, model: TaskModel, parameters: Mapping[str, nn.Parameter], space: VectorSpace, hvp: str
    ) -> BatchedOperator:
        run = self.run
        options = curvature_options(run.config)
        if hvp != options.hvp:
            options = dataclasses.replace(options, hvp=hvp, compile=False)
        samples = curvature_samples(run, [task], options.num_samples)
        return task_operator(model, run.objective, samples, parameters, run.accelerator, options, space)
