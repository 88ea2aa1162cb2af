"""Plain sequential fine-tuning: the lower bound every continual-learning method is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from nostalgia.methods.base import Method, StepRule

if TYPE_CHECKING:
    from nostalgia.linalg.lanczos import Eigenpairs
    from nostalgia.projection.memory import MemoryUpdate


class PlainStep(StepRule):
    """The optimizer's own step."""


class Finetune(Method):
    name = "finetune"

    def step_rule(self, task: int, parameters: Mapping[str, nn.Parameter]) -> StepRule:
        return PlainStep()

    def finish_task(self, task: int, eigenpairs: Eigenpairs) -> MemoryUpdate:
        raise NotImplementedError(f"{self.name} keeps nothing of a finished task")
