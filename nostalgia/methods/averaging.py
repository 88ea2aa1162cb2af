"""Weight averaging: the network after a task is a mean of the networks at the ends of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.vectors import vectors_memory_plan
from nostalgia.models import norm_statistics
from nostalgia.models.backbone import Backbone
from nostalgia.models.task_model import TaskModel
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size

NORM_SAMPLES = 512  # that batch-norm statistics of averaged weights are taken from
MODES = ("interpolation", "uniform", "greedy")


@dataclass(frozen=True)
class AveragingConfig:
    mode: str = option(
        "interpolation",
        "interpolation: between the network before and after the task; uniform: the mean of all task ends; greedy: that mean "
        "where the mean validation accuracy over the tasks seen does not fall.",
        choices=MODES,
    )
    share: float = option(0.5, "Of interpolation: the share of the new task's end.", above=0, high=1)


class Averaging(Method):
    """theta_t <- theta_{t-1} + share (theta_t - theta_{t-1}) (interpolation), or the mean of the ends of tasks 1..t (uniform).

    Model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482; each task begins at the average so far. greedy
    looks at validation images of earlier tasks. Batch-norm statistics are taken anew, from images of the task. Remembers P
    numbers.
    """

    name = "averaging"
    keeps_positions = True
    Config = AveragingConfig
    strengths = (0.1, 0.25, 0.5, 0.75, 0.9)
    strength_option = "share"

    def __init__(self, config: AveragingConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.mean: Tensor | None = None  # (P_local,) of the task ends so far
        self.tasks = 0
        self._block: Block | None = None

    @torch.no_grad()
    def end_task(self, task: TaskContext) -> None:
        parameters = list(task.parameters.values())
        end = task.space.take(p.detach() for p in parameters)
        before, self.tasks = self.mean, self.tasks + 1
        if before is None:
            self.mean = end
        else:
            share = self.config.share if self.config.mode == "interpolation" else 1 / self.tasks
            self.mean = before + share * (end - before)
            backbone = cast(Backbone, cast(TaskModel, task.model).backbone)
            own = task.validate() if self.config.mode == "greedy" else 0.0
            statistics = norm_statistics.capture(backbone)
            task.space.put(self.mean, parameters)
            if norm_statistics.has_batch_norm(backbone):  # those that training has left are of other weights
                norm_statistics.measure_anew(backbone, [b.images for b in task.samples(NORM_SAMPLES, 64)])
            if self.config.mode == "greedy" and task.validate() < own:
                task.space.put(end, parameters)
                norm_statistics.apply(backbone, statistics)
                self.mean, self.tasks = before, self.tasks - 1
        self._block = Block(self.mean[None], task.space)

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        return vectors_memory_plan(space, 1)

    def bytes_remembered(self) -> int:
        return 0 if self.mean is None else world_size() * self.mean.numel() * self.mean.element_size()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._block, "tasks": self.tasks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._block, self.tasks = state["mean"], state["tasks"]
        self.mean = None if self._block is None else self._block.rows[0]
