"""Distillation of earlier tasks' outputs on the present task's images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.data.stream import Batch
from nostalgia.methods.base import TaskContext
from nostalgia.models.objective import Output
from nostalgia.parallel.modules import frozen_copy, inner_module, named_parameters


class Distillation:
    """strength sum_{u<t} T^2 KL(softmax(z_u^old / T) || softmax(z_u / T)), summed over the batch by its weights.

    The teacher is the network as a task begins: the end of the task before. It needs the heads of all tasks in the model
    (`Method.all_heads`), frozen. One forward pass a step; a copy of what is trained while the task lasts. Nothing at
    strength 0, and in the first task.
    """

    def __init__(self, strength: float, temperature: float) -> None:
        self.strength, self.temperature = strength, temperature
        self.teacher: nn.Module | None = None
        self._kept: dict[str, Tensor] = {}  # the teacher's tensors that another task's teacher has not

    def begin(self, task: TaskContext) -> None:
        self.end()
        if self.strength == 0 or not _has_earlier_heads(task.model):
            return
        self.task, self.teacher = task, frozen_copy(task.model)
        trained = {name for name, p in named_parameters(task.model).items() if p.requires_grad}
        buffers = dict(inner_module(task.model).named_buffers())
        self._kept = {
            name: value
            for name, value in [*self.teacher.named_parameters(), *self.teacher.named_buffers()]
            if name in trained or name in buffers
        }

    def add(self, output: Output, batch: Batch) -> None:
        """Add the term to the loss of ``output``, the model's own on ``batch``."""
        if self.teacher is None:
            return
        with torch.no_grad(), self.task.accelerator.autocast():
            old = self.teacher(batch.images)
        total = output.loss
        for head, (now, then) in enumerate(zip(output.logits, old, strict=True)):
            if head != self.task.head:
                total = total + self.strength * (divergence(now, then, self.temperature) * batch.weights).sum()
        output.loss = total

    def end(self) -> None:
        """Let the teacher go."""
        self.teacher, self._kept = None, {}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._kept)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Into the teacher, if there is one yet."""
        if self.teacher is None:
            return
        if set(state) != set(self._kept):
            odd = sorted(set(state) ^ set(self._kept))
            raise ValueError(f"the teacher's tensors are not those of this network: {', '.join(odd[:3])}")
        for name, value in self._kept.items():
            value.copy_(state[name])


def divergence(now: Tensor, then: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(then / T) || softmax(now / T)) of each row (B,), of logits (B, C)."""
    wide = torch.promote_types(now.dtype, torch.float32)
    log_now = F.log_softmax(now.to(wide) / temperature, dim=1)
    log_then = F.log_softmax(then.to(wide) / temperature, dim=1)
    return temperature**2 * (log_then.exp() * (log_then - log_now)).sum(dim=1)


def _has_earlier_heads(model: nn.Module) -> bool:
    """Whether the model holds the head of an earlier task beside the present one's."""
    heads = getattr(inner_module(model), "heads", ())
    return len(heads) > 1
