"""Stored exemplars of finished tasks within a byte budget: the same choice on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nostalgia.data.exemplars import Exemplar
from nostalgia.data.stream import stable_seed, stratified_choice
from nostalgia.methods.base import TaskContext


class ExemplarMemory:
    """(task, index) pairs of training images, in equal shares for all tasks seen; `per_task` is in order of choice.

    A task's exemplars are a seeded choice in proportion to its classes; when later tasks need room, the first of them stay.
    """

    def __init__(self, budget_bytes: int, seed: int) -> None:
        self.budget_bytes, self.seed = budget_bytes, seed
        self.per_task: dict[int, list[int]] = {}
        self.bytes_each: dict[int, int] = {}  # of a task's exemplar, what is kept beside its image included

    def add(self, task: TaskContext, extra_bytes: int = 0) -> None:
        """Choose exemplars of the task that ends; ``extra_bytes`` are kept with each beside its image."""
        self.bytes_each[task.index] = task.image_bytes + extra_bytes
        counts = {number: self.budget_bytes // each // task.index for number, each in self.bytes_each.items()}
        for number, indices in self.per_task.items():
            self.per_task[number] = indices[: counts[number]]
        labels, share = task.tasks[-1].train.labels, counts[task.index]
        chosen = stratified_choice(labels, min(share, len(labels)), stable_seed(self.seed, "exemplars", task.index))
        self.per_task[task.index] = chosen.tolist()

    def pairs(self) -> list[Exemplar]:
        return [(task, index) for task, indices in self.per_task.items() for index in indices]

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.per_task.values())

    @property
    def bytes(self) -> int:
        return sum(len(indices) * self.bytes_each[task] for task, indices in self.per_task.items())

    def state_dict(self) -> dict[str, Any]:
        return {
            "tasks": {str(task): indices for task, indices in self.per_task.items()},
            "bytes": {str(task): each for task, each in self.bytes_each.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.per_task = {int(task): list(indices) for task, indices in state["tasks"].items()}
        self.bytes_each = {int(task): each for task, each in state["bytes"].items()}
