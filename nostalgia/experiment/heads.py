"""The heads of a run's tasks: one each, or one that several tasks go on with, grown by their new classes."""

from __future__ import annotations

from torch import nn

from nostalgia.data.tasks import Task, head_classes
from nostalgia.experiment.setup import Parts
from nostalgia.models import expand_head, make_head


def new_heads(parts: Parts, tasks: list[Task]) -> list[nn.Module]:
    """The heads that ``tasks`` are trained with, one each; tasks that share a head get the same module."""
    classes = head_classes(tasks)
    made: dict[str, nn.Module] = {}
    for task in tasks:
        if task.head not in made:
            seed = parts.config.experiment.seed * 1000 + task.index
            before = _trained(parts, task.head)
            if before is None:
                head = make_head(parts.backbone.feature_dim, len(classes[task.head]), seed)
            else:
                head = expand_head(before, len(classes[task.head]), seed)
            made[task.head] = head.to(device=parts.accelerator.device, dtype=parts.view.dtype)
    return [made[task.head] for task in tasks]


def take_up(parts: Parts, tasks: list[Task], heads: list[nn.Module]) -> None:
    """Add the trained ``heads`` of ``tasks``; earlier tasks are evaluated with what has become of theirs."""
    newest = {task.head: head for task, head in zip(tasks, heads, strict=True)}
    parts.heads[:] = [newest.get(t.head, h) for t, h in zip(parts.tasks, parts.heads, strict=False)] + heads


def empty_heads(parts: Parts, count: int) -> list[nn.Module]:
    """Heads as the first ``count`` tasks have left them, their values still to be filled in."""
    return new_heads(parts, parts.tasks[:count])


def _trained(parts: Parts, name: str) -> nn.Linear | None:
    for task, head in zip(parts.tasks, parts.heads, strict=False):
        if task.head == name:
            assert isinstance(head, nn.Linear)
            return head
    return None
