"""L2-SP: a quadratic pull to the weights that the run began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.vectors import QuadraticPenalty, vectors_memory_plan
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size


@dataclass(frozen=True)
class L2SpConfig:
    strength: float = option(0.01, "lam of lam/2 |theta - theta_0|^2.", low=0)


class L2Sp(Method):
    """lam/2 |theta - theta_0|^2, theta_0 the parameters in scope before the first task.

    Li, Grandvalet and Davoine 2018, https://arxiv.org/abs/1802.01483, without its second term, a pull of the new head to zero
    (``train.weight_decay`` pulls there, all that is trained). Remembers P numbers.
    """

    name = "l2sp"
    keeps_positions = True
    Config = L2SpConfig
    strengths = (0.0001, 0.001, 0.01, 0.1, 1.0)

    def __init__(self, config: L2SpConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.penalty = QuadraticPenalty()

    def begin_task(self, task: TaskContext) -> None:
        if self.penalty.center is None:
            self.penalty.set(task, None)

    def gradients(self) -> None:
        self.penalty.add_gradients(self.task, self.config.strength)

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        return vectors_memory_plan(space, 1)

    def bytes_remembered(self) -> int:
        return self.penalty.bytes(world_size())

    def state_dict(self) -> dict[str, Any]:
        return self.penalty.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.load_state_dict(state)
