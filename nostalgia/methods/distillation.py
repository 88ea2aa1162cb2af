"""Distillation of earlier tasks' outputs on the present task's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.data.stream import Batch
from nostalgia.data.tasks import head_classes
from nostalgia.methods.base import TaskContext
from nostalgia.models.objective import Output
from nostalgia.parallel.modules import frozen_copy, inner_module, named_parameters

REMEMBERED_BYTES = 2**30


class Distillation:
    """strength sum_{u<t} T^2 KL(softmax(z_u^old / T) || softmax(z_u / T)), summed over the batch by its weights.

    The teacher is the network as a task begins: the end of the task before. It needs the heads of all tasks in the model
    (`Method.all_heads`), frozen; of a head that tasks share, the classes that it had are held. Its outputs cost one forward
    pass a step, or one pass over the task's images in all where training sees them more often and none is augmented
    (`REMEMBERED_BYTES` at most, on every rank). A copy of what is trained lasts as long as the task. Nothing at strength 0,
    and in the first task.
    """

    def __init__(self, strength: float, temperature: float) -> None:
        self.strength, self.temperature = strength, temperature
        self.teacher: nn.Module | None = None
        self._kept: dict[str, Tensor] = {}  # the teacher's tensors that another task's teacher has not
        self._own_columns = 0  # of the present task's head: the classes that earlier tasks have given it
        self._remembered: list[Tensor] | None = None  # of every training image: (images, classes) of each earlier head

    def begin(self, task: TaskContext) -> None:
        self.end()
        before = head_classes(task.tasks[:-1])
        self._own_columns = len(before.get(task.tasks[-1].head, ()))
        if self.strength == 0 or not before:
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
        # Not in `begin`: a run that resumes within the task puts the teacher back after it.
        if self._remembered is None and self._worth_remembering():
            self._remembered = self._of_every_image()
        old = self._taught(batch) if self._remembered is None else [z[batch.indices] for z in self._remembered]
        total = output.loss
        for now, then in zip(self._earlier(output.logits), old, strict=True):
            total = total + self.strength * (divergence(now, then, self.temperature) * batch.weights).sum()
        output.loss = total

    def end(self) -> None:
        """Let the teacher go."""
        self.teacher, self._kept, self._remembered = None, {}, None

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

    @torch.no_grad()
    def _taught(self, batch: Batch) -> list[Tensor]:
        """The teacher's logits (B, C) that are held, of each head."""
        assert self.teacher is not None
        with self.task.accelerator.autocast():
            return self._earlier(self.teacher(batch.images))

    def _earlier(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Of the classes of earlier tasks: other heads' outputs, and those first ones of the present head."""
        held = [z if head != self.task.head else z[:, : self._own_columns] for head, z in enumerate(logits)]
        return [z for z in held if z.shape[1]]

    def _worth_remembering(self) -> bool:
        task = self.task
        if task.every_image is None or task.passes <= 1:
            return False
        classes = sum(map(len, head_classes(task.tasks[:-1]).values()))
        return len(task.tasks[-1].train) * classes * torch.float32.itemsize <= REMEMBERED_BYTES

    def _of_every_image(self) -> list[Tensor]:
        """The teacher's logits (images, C) that are held, of each head; each rank computes its share. A collective."""
        task, found = self.task, list[Tensor]()
        assert task.every_image is not None
        for batch in task.every_image():
            old, own = self._taught(batch), batch.valid
            found = found or [z.new_zeros(len(task.tasks[-1].train), z.shape[1], dtype=_wide(z.dtype)) for z in old]
            for all_images, z in zip(found, old, strict=True):
                all_images[batch.indices[own]] = z[own].to(all_images.dtype)
        return [cast(Tensor, task.accelerator.reduce(z, "sum")) for z in found]


def divergence(now: Tensor, then: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(then / T) || softmax(now / T)) of each row (B,), of logits (B, C)."""
    wide = _wide(now.dtype)
    log_now = F.log_softmax(now.to(wide) / temperature, dim=1)
    log_then = F.log_softmax(then.to(wide) / temperature, dim=1)
    return temperature**2 * (log_then.exp() * (log_then - log_now)).sum(dim=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
