"""Synaptic intelligence: a quadratic pull weighted by what each parameter contributed to the loss's decrease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.vectors import QuadraticPenalty, gradients_of, training_space, vectors_memory_plan
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size


@dataclass(frozen=True)
class SiConfig:
    strength: float = option(1.0, "c of c sum_i Omega_i (theta_i - theta*_i)^2.", low=0)
    damping: float = option(1e-3, "xi, added to the squared displacement of a task.", above=0)


class SynapticIntelligence(Method):
    """c sum_i Omega_i (theta_i - theta*_i)^2, Omega_i = sum_t max(0, w_ti) / (D_ti^2 + xi).

    w_t is the path integral of -g . d theta over task t (g the task's own gradient), D_t its displacement, theta* the
    end of the latest task. Zenke, Poole and Ganguli 2017, https://arxiv.org/abs/1703.04200. Remembers 2 P numbers.
    """

    name = "si"
    keeps_positions = True
    Config = SiConfig
    strengths = (0.01, 0.1, 1.0, 10.0, 100.0)

    def __init__(self, config: SiConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.penalty = QuadraticPenalty()
        self.path: Tensor | None = None  # (L,) w_t so far
        self.start: Tensor | None = None  # (L,) the parameters at the start of the task
        self._gradient: Tensor | None = None

    def begin_task(self, task: TaskContext) -> None:
        self.start = self._parameters(task)
        self.path = torch.zeros_like(self.start)

    def gradients(self) -> None:
        if self.config.strength == 0:
            return
        self._gradient = training_space(self.task).take(gradients_of(self.task))
        self.penalty.add_gradients(self.task, 2 * self.config.strength)

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        if self._gradient is None or self.path is None:
            optimizer.step()
            return
        before = self._parameters(self.task)
        optimizer.step()
        if not getattr(optimizer, "step_was_skipped", False):  # by float16's scaler: the gradient is not finite
            self.path.addcmul_(self._gradient, self._parameters(self.task).sub_(before), value=-1.0)
        self._gradient = None

    def end_task(self, task: TaskContext) -> None:
        assert self.path is not None
        assert self.start is not None
        displacement = self._parameters(task) - self.start
        importance = self.path.clamp_min(0.0) / (displacement.square() + self.config.damping)
        before = self.penalty.weights
        self.penalty.set(task, importance if before is None else before + importance)
        self.path = self.start = None

    @staticmethod
    def _parameters(task: TaskContext) -> Tensor:
        return training_space(task).take(p.detach() for p in task.parameters.values())

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        return vectors_memory_plan(space, 2)

    def bytes_remembered(self) -> int:
        return self.penalty.bytes(world_size())

    def state_dict(self) -> dict[str, Any]:
        state = self.penalty.state_dict()
        if self.path is not None and self.start is not None:
            state["path"] = Block(torch.stack([self.path, self.start]), training_space(self.task))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.load_state_dict(state)
        if "path" in state:
            block: Block = state["path"]
            space = block.space.replicated() if block.space.placement == "sliced" else block.space
            self.path, self.start = (row.clone() for row in block.to(space))
