"""Plain sequential fine-tuning: the lower bound every continual-learning method is held against."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nostalgia.methods.base import Method, StepRule


class PlainStep(StepRule):
    """The optimizer's own step."""


class Finetune(Method):
    name = "finetune"

    def step_rule(self, task: int, parameters: Mapping[str, nn.Parameter]) -> StepRule:
        return PlainStep()
