"""Experience replay: each step also trains on stored exemplars of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nostalgia.data.exemplars import ExemplarLoader
from nostalgia.data.stream import Batch
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.exemplar_memory import ExemplarMemory
from nostalgia.models.objective import Output
from nostalgia.options import option


@dataclass(frozen=True)
class ReplayConfig:
    budget_bytes: int = option(10_000_000, "Of the stored exemplars, over all tasks: 3 bytes a pixel.", low=0)
    strength: float = option(1.0, "Weight of an exemplar beside a new image.", low=0)


class ExperienceReplay(Method):
    """mean loss of the new images + strength times the mean loss of as many exemplars, each under its own task's head.

    Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486; the exemplars are chosen when a task ends, in proportion to its
    classes, not by a reservoir. An image has one exemplar beside it in each epoch, drawn by the image and the epoch, so
    that no number of ranks changes it. Remembers up to ``budget_bytes``.
    """

    name = "er"
    Config = ReplayConfig
    strengths = (0.1, 0.3, 1.0, 3.0)
    trains_heads = True

    def __init__(self, config: ReplayConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.memory = ExemplarMemory(config.budget_bytes, seed)
        self.exemplars: ExemplarLoader | None = None

    @property
    def replays(self) -> bool:
        return len(self.memory) > 0 and self.config.strength > 0

    @property
    def all_heads(self) -> bool:  # type: ignore[override]
        return self.replays

    def begin_task(self, task: TaskContext) -> None:
        self.exemplars = task.loader(self.memory.pairs()) if self.replays else None

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        if self.exemplars is None:
            return super().loss(model, batch)
        output, _ = self.replayed(self.exemplars, model, batch)
        return output

    def replayed(self, exemplars: ExemplarLoader, model: nn.Module, batch: Batch) -> tuple[Output, Batch]:
        """Loss of the batch and of as many exemplars, in one pass; correct answers are the batch's own."""
        old = exemplars.paired(batch)
        old.weights = self.config.strength * old.weights
        output = self.task.objective(model, batch.followed_by(old))
        own = tuple(logits[: len(batch)] for logits in output.logits)
        output.correct = self.task.objective.correct(own, batch).detach()
        return output, old

    def end_task(self, task: TaskContext) -> None:
        self.exemplars = None
        if self.config.budget_bytes >= task.image_bytes:
            self.memory.add(task)

    def memory_plan(self, space: Any, num_tasks: int) -> MemoryPlan:
        return MemoryPlan(self.config.budget_bytes, "exemplars, at most")

    def bytes_remembered(self) -> int:
        return self.memory.bytes

    def state_dict(self) -> dict[str, Any]:
        return {"exemplars": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state["exemplars"])
