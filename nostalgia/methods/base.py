"""What a continual-learning method decides: how a task's steps are taken, and what a finished task leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from nostalgia.linalg.lanczos import Eigenpairs
    from nostalgia.projection.memory import MemoryUpdate


class StepRule(Protocol):
    """The part of an optimizer step that belongs to the method, for one task.

    Called in this order once a step, when gradients are synchronised and unscaled: `project_gradients`, (clipping),
    `step`. The base class is plain fine-tuning.
    """

    def project_gradients(self) -> Tensor | None:
        """Change the gradients in place; returns the fraction of |g|^2 removed, None where nothing is projected."""
        return None

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step."""
        optimizer.step()

    def leak(self) -> float | None:
        """Share of the displacement since the start that lies where it must not, None where nothing is projected."""
        return None

    def vectors(self) -> dict[str, Tensor]:
        """Whole vectors (P,) that the rest of the task depends on, for a checkpoint: a collective, the same on all."""
        return {}

    def load_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Take up what `vectors` gave, given whole on every rank."""
        return None


class Method(Protocol):
    """A method, over all tasks of a run. ``task`` counts from 1."""

    name: str
    joint: bool = False  # train once on the data of all tasks together
    needs_curvature: bool = False  # call `finish_task` with the eigenpairs of each finished task

    def step_rule(self, task: int, parameters: Mapping[str, nn.Parameter]) -> StepRule:
        """The rule for a task that starts now; ``parameters`` are the projected ones, as they are trained."""
        ...

    def finish_task(self, task: int, eigenpairs: Eigenpairs) -> MemoryUpdate:
        """Take in the curvature of a finished task; only called where ``needs_curvature``."""
        ...
