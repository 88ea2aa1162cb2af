"""Elastic weight consolidation: a quadratic pull to earlier tasks' weights by the diagonal of their Fisher matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nostalgia.curvature.fisher import LABELS, diagonal_fisher
from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.vectors import QuadraticPenalty, training_space, vectors_memory_plan
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size


@dataclass(frozen=True)
class EwcConfig:
    strength: float = option(100.0, "lam of lam/2 sum_t sum_i F_ti (theta_i - theta*_ti)^2.", low=0)
    labels: str = option("sampled", "Of the Fisher matrix: sampled from the model, or true.", choices=LABELS)
    online: bool = option(False, "One running Fisher, F <- gamma F + F_t, around the latest task's end.")
    gamma: float = option(1.0, "Of online.", low=0, high=1)
    num_samples: int = option(512, "Training images of a finished task that its Fisher matrix is taken over.", low=1)


class Ewc(Method):
    """lam/2 sum_t sum_i F_ti (theta_i - theta*_ti)^2, or its online form.

    Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796; online: Schwarz et al. 2018,
    https://arxiv.org/abs/1805.06370. Remembers 2 P numbers: the sum over tasks is one quadratic form around a weighted
    mean of the tasks' ends.
    """

    name = "ewc"
    keeps_positions = True
    Config = EwcConfig
    strengths = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)

    def __init__(self, config: EwcConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.penalty = QuadraticPenalty()

    def gradients(self) -> None:
        self.penalty.add_gradients(self.task, self.config.strength)

    def end_task(self, task: TaskContext) -> None:
        if not task.wants_curvature:
            return
        options = self.config
        fisher = diagonal_fisher(
            task.model,
            task.objective.forward_fn,
            task.samples(options.num_samples),
            task.parameters,
            task.space,
            labels=options.labels,
            seed=self.seed,
        )
        weights = Block(fisher[None], task.space).to(training_space(task))[0]
        if options.online:
            before = self.penalty.weights
            self.penalty.set(task, weights if before is None else options.gamma * before + weights)
        else:
            self.penalty.include(task, weights)

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        return vectors_memory_plan(space, 2)

    def bytes_remembered(self) -> int:
        return self.penalty.bytes(world_size())

    def state_dict(self) -> dict[str, Any]:
        return self.penalty.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.load_state_dict(state)
