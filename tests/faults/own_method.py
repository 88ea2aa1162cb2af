"""A method of the user's own with state of every kind: numbers, lists, tensors of the task and of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nostalgia.methods import Method, TaskContext


class Counting(Method):
    """Pulls parameters to where the task began, the more the more steps there were."""

    name = "counting"

    def __init__(self, config: Any, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.steps, self.ends, self.start = 0, [], {}  # type: int, list[float], dict[str, Tensor]

    def begin_task(self, task: TaskContext) -> None:
        self.start = {name: p.detach().clone() for name, p in task.parameters.items()}

    @torch.no_grad()
    def gradients(self) -> None:
        self.steps += 1
        for name, parameter in self.task.parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self.start[name], alpha=0.01 * self.steps)

    def end_task(self, task: TaskContext) -> None:
        self.ends.append(float(sum(p.detach().double().sum() for p in task.parameters.values())))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "ends": self.ends, "start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.ends, self.start = state["steps"], list(state["ends"]), dict(state["start"])


class Failing(Counting):
    """A method with a mistake in a hook."""

    def begin_task(self, task: TaskContext) -> None:
        (Path(__file__).parent / "nowhere").read_text()
