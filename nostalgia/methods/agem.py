"""A-GEM: gradients may not point against the gradient of stored exemplars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nostalgia.data.exemplars import ExemplarLoader
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.exemplar_memory import ExemplarMemory
from nostalgia.methods.vectors import add_to, gradients_of, training_space
from nostalgia.models import norm_statistics
from nostalgia.options import option


@dataclass(frozen=True)
class AGemConfig:
    budget_bytes: int = option(10_000_000, "Of the stored exemplars, over all tasks: 3 bytes a pixel.", low=0)
    reference_size: int = option(128, "Exemplars that a step's reference gradient is taken over.", low=1)


class AGem(Method):
    """g <- g - (g.r / |r|^2) r where g.r < 0, r the mean gradient of exemplars drawn anew each step.

    Over the parameters in scope; heads of earlier tasks are frozen. Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420.
    Remembers up to ``budget_bytes``; one more pass over ``reference_size`` images a step.
    """

    name = "agem"
    Config = AGemConfig
    strengths = (100_000, 1_000_000, 10_000_000)
    strength_option = "budget_bytes"

    def __init__(self, config: AGemConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.memory = ExemplarMemory(config.budget_bytes, seed)
        self.exemplars: ExemplarLoader | None = None
        self.steps = 0
        self._violated = 0.0

    @property
    def all_heads(self) -> bool:  # type: ignore[override]
        return len(self.memory) > 0

    def begin_task(self, task: TaskContext) -> None:
        self.exemplars = task.loader(self.memory.pairs()) if len(self.memory) else None

    def gradients(self) -> None:
        if self.exemplars is None:
            return
        self.steps += 1
        trained = [p for p in self.task.model.parameters() if p.requires_grad]
        own = [None if p.grad is None else p.grad.clone() for p in trained]  # DDP's gradients are views of its buckets
        mine = training_space(self.task).take(gradients_of(self.task))
        for parameter in trained:
            parameter.grad = None
        self._reference(self.exemplars)
        space = training_space(self.task)
        reference = space.take(gradients_of(self.task))
        for parameter, gradient in zip(trained, own, strict=True):
            if gradient is None or parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.copy_(gradient)
        products = space.gram(reference[None], torch.stack([mine, reference]))[0]
        if self.task.accelerator.scaler is not None and not bool(torch.isfinite(products).all()):
            for parameter in trained:  # float16's scaler has not seen the reference: this step is left out here
                parameter.grad = None
            return
        self._violated = float(products[0] < 0)
        if products[0] < 0:
            add_to(gradients_of(self.task), reference.mul_(float(-products[0] / products[1])))

    def _reference(self, exemplars: ExemplarLoader) -> None:
        """Leave the mean gradient of drawn exemplars in the parameters' gradients, synchronised over ranks."""
        task, count = self.task, min(self.config.reference_size, len(exemplars))
        scaler = task.accelerator.scaler
        with norm_statistics.held(task.model):  # they are those of the task's own images
            output = task.objective(task.model, exemplars.drawn(count, self.steps))
            task.accelerator.backward(output.loss * (task.accelerator.num_processes / count))
        if scaler is not None:
            for gradient in gradients_of(task):
                gradient.div_(scaler.get_scale())

    def end_task(self, task: TaskContext) -> None:
        self.exemplars = None
        if self.config.budget_bytes >= task.image_bytes:
            self.memory.add(task)

    def metrics(self) -> dict[str, float]:
        return {} if self.exemplars is None else {"violated": self._violated}

    def memory_plan(self, space: Any, num_tasks: int) -> MemoryPlan:
        return MemoryPlan(self.config.budget_bytes, "exemplars, at most")

    def bytes_remembered(self) -> int:
        return self.memory.bytes

    def state_dict(self) -> dict[str, Any]:
        return {"exemplars": self.memory.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state["exemplars"])
        self.steps = state["steps"]
