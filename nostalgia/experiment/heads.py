"""The heads of a run: one for each task, or one that several tasks go on with, grown by their new classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from nostalgia.data.tasks import Task, head_classes
from nostalgia.experiment.components import Components
from nostalgia.models import expand_head, make_head


def new_heads(run: Components, tasks: Sequence[Task]) -> dict[str, nn.Module]:
    """The heads that ``tasks`` are trained with, by name: new ones, or the run's own grown by the tasks' classes."""
    made: dict[str, nn.Module] = {}
    first = {task.head: task.index for task in reversed(tasks)}
    for name, classes in head_classes(tasks).items():
        seed = run.config.experiment.seed * 1000 + first[name]
        before = run.heads.get(name)
        if before is None:
            head = make_head(run.backbone.feature_dim, len(classes), seed)
        else:
            assert isinstance(before, nn.Linear)
            head = expand_head(before, len(classes), seed)
        made[name] = head.to(device=run.accelerator.device, dtype=run.view.dtype)
    return made


def empty_heads(run: Components, count: int) -> dict[str, nn.Module]:
    """Heads as the first ``count`` tasks have left them, their values still to be filled in."""
    return new_heads(run, run.tasks[:count])


def heads_in_training(run: Components, new: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The heads of the trained model: those of the present task, or all of the run where the method wants them.

    Those of earlier tasks are copies, for FSDP2 shards what it wraps in place, and frozen unless the method trains them.
    """
    method = run.method
    if not method.all_heads:
        return new
    heads = {**copy.deepcopy(run.heads), **new}
    for name, head in heads.items():
        head.requires_grad_(name in new or method.trains_heads)
    return heads
