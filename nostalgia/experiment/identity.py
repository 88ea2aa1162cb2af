"""What a checkpoint must agree on with the run that goes on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nostalgia.errors import NotFoundError
from nostalgia.experiment.components import Components
from nostalgia.parallel import tensors
from nostalgia.parallel.accelerator import strategy
from nostalgia.utils.own_code import code_of
from nostalgia.utils.versions import versions

FORMAT = 4  # of a checkpoint's state


class RunIdentity:
    """``saved`` stands in every checkpoint: format, tasks, the first weights' checksum (rank 0), versions, ..."""

    def __init__(self, run: Components, initial: Mapping[str, Tensor]) -> None:
        self.tasks = run.tasks
        self.saved: dict[str, Any] = {
            "format": FORMAT,
            "tasks": [[t.name, t.classes] for t in run.tasks],
            "initial": _fingerprint(initial) if tensors.is_main() else "",
            "global_batch": run.global_batch_size,
            "strategy": strategy(run.accelerator),
            "versions": versions(),
            "code": code_of(type(run.method)),
            "config": OmegaConf.to_container(OmegaConf.structured(run.config), resolve=True),
        }

    def check(self, saved: dict[str, Any], source: str) -> None:
        """Raise NotFoundError where data or pretrained weights are not those the run began with."""
        if saved.get("format") != FORMAT:
            raise NotFoundError(
                f"{source}: written by another version of this program, whose runs this one does not go on with; begin a "
                "new run (report, figures and evaluate still read the old one)"
            )
        for task, (name, classes) in zip(self.tasks, saved["tasks"], strict=False):
            if task.name != name or list(task.classes) != list(classes):
                raise NotFoundError(
                    f"{source}: {task.name} has {len(task.classes)} classes that are not those of {name} when the run "
                    "began; put the data back, or begin a new run"
                )
        if tensors.broadcast_object(self.saved["initial"] != saved["initial"]):
            raise NotFoundError(
                f"{source}: the backbone's first weights are not those the run began with (other pretrained weights, "
                "or another version of a library); put them back, or begin a new run"
            )


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
