"""The method: later tasks move in the complement of the top curvature directions of finished ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.errors import UsageError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.methods.base import Method, StepRule
from nostalgia.methods.finetune import PlainStep
from nostalgia.projection import CurvatureMemory, GradientProjector, MemoryUpdate

PROJECTIONS = ("gradient", "displacement", "constrained")


class ProjectedStep(StepRule):
    """Gradient projection, and for the two exact kinds a projected step as well."""

    def __init__(self, projector: GradientProjector, project: str) -> None:
        self.projector = projector
        self.project = project

    def project_gradients(self) -> Tensor | None:
        return self.projector.project_gradients()

    def step(self, optimizer: Optimizer) -> None:
        if self.project == "constrained":
            self.projector.constrain_step(optimizer)
        elif self.project == "displacement":
            self.projector.displace_step(optimizer)
        else:
            optimizer.step()

    def leak(self) -> float | None:
        return self.projector.leak()

    def vectors(self) -> dict[str, Tensor]:
        return {"anchor": self.projector.whole_anchor()}

    def load_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        self.projector.set_anchor(vectors["anchor"])


class Nostalgia(Method):
    """Projects steps from task ``start_task`` on (counted from 1) away from ``memory``."""

    name = "nostalgia"
    needs_curvature = True

    def __init__(self, memory: CurvatureMemory, project: str = "constrained", start_task: int = 2) -> None:
        if project not in PROJECTIONS:
            raise UsageError(f"project={project!r}: allowed are {', '.join(PROJECTIONS)}")
        self.memory = memory
        self.project = project
        self.start_task = start_task

    def step_rule(self, task: int, parameters: Mapping[str, nn.Parameter]) -> StepRule:
        if task < self.start_task or self.memory.basis is None:
            return PlainStep()
        return ProjectedStep(GradientProjector(self.memory, parameters), self.project)

    def finish_task(self, task: int, eigenpairs: Eigenpairs) -> MemoryUpdate:
        return self.memory.update(eigenpairs)
