"""A quadratic penalty along the kept curvature directions, in place of a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.linalg.block import Block
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.eigensolve import check_eigensolve
from nostalgia.methods.eigenspace import Eigenspace, EigenspaceConfig
from nostalgia.methods.vectors import gradients_of, vectors_memory_plan
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size


@dataclass(frozen=True)
class NostalgiaEwcConfig(EigenspaceConfig):
    strength: float = option(10.0, "lam of lam/2 (theta - theta*)^T Q Lambda Q^T (theta - theta*).", low=0)
    merge: str = option(
        "average", "The running mean Hessian, a moving mean (ema), or a union.", choices=("average", "ema", "union")
    )


class NostalgiaEwc(Method):
    """lam/2 (theta - theta*)^T Q Lambda Q^T (theta - theta*), theta* the end of the latest task.

    Q and Lambda are the running mean Hessian's top eigenpairs. Remembers (k + 1) P numbers.
    """

    name = "nostalgia_ewc"
    keeps_positions = True
    Config = NostalgiaEwcConfig
    strengths = (0.1, 1.0, 10.0, 100.0, 1000.0)

    def __init__(self, config: NostalgiaEwcConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.eigenspace = Eigenspace(config)
        self.num_tasks = 1
        self.center: Tensor | None = None  # (P_local,) in the memory's space

    def check(self, num_tasks: int, curvature: CurvatureOptions) -> None:
        check_eigensolve(self.config.top_k, curvature)

    def begin_task(self, task: TaskContext) -> None:
        self.num_tasks = task.num_tasks
        self.eigenspace.begin(task)

    @torch.no_grad()
    def gradients(self) -> None:
        memory = self.eigenspace.memory
        if memory.basis is None or memory.space is None or self.center is None or self.config.strength == 0:
            return
        space = memory.space
        change = space.take(p.detach() for p in self.task.parameters.values()).sub_(self.center)
        basis = memory.basis.to(space.dtype)
        coefficients = space.all_reduce(torch.mv(basis, change).double())
        weights = self.config.strength * memory.eigenvalues.to(coefficients.device) * coefficients
        gradients = gradients_of(self.task)
        g = space.take(gradients).addmv_(basis.T, weights.to(space.dtype))
        space.put(g, gradients)

    def end_task(self, task: TaskContext) -> None:
        if not task.wants_curvature:
            return
        self.eigenspace.end(task)
        space = self.eigenspace.memory.space
        self.center = None if space is None else space.take(p.detach() for p in task.parameters.values())

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        plan, center = self.eigenspace.memory_plan(space, num_tasks), vectors_memory_plan(space, 1)
        return MemoryPlan(plan.bytes + center.bytes, f"{plan.text} and {center.text}")

    def bytes_remembered(self) -> int:
        return self.eigenspace.bytes_remembered() + (
            0 if self.center is None else world_size() * self.center.numel() * self.center.element_size()
        )

    def replicated_tensors(self) -> dict[str, Tensor]:
        return self.eigenspace.replicated_tensors()

    def eigenpairs(self) -> Eigenpairs | None:
        return self.eigenspace.pairs

    def report(self) -> dict[str, Any]:
        return self.eigenspace.report()

    def note(self) -> str:
        return self.eigenspace.note()

    def state_dict(self) -> dict[str, Any]:
        space = None if self.eigenspace.made is None else self.eigenspace.made.space
        center = None if self.center is None or space is None else Block(self.center[None], space)
        return {**self.eigenspace.state_dict(self.task), "num_tasks": self.num_tasks, "center": center}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_tasks = state["num_tasks"]
        self.eigenspace.load_state_dict(state, self.num_tasks)
        space = None if self.eigenspace.made is None else self.eigenspace.made.space
        if state["center"] is not None and space is not None:
            self.center = state["center"].to(space)[0].clone()
