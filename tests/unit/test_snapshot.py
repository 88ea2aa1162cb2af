"""What a checkpoint takes of a run that is stopped where its parts are not as they will go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from nostalgia.experiment.setup import build_parts

from nostalgia.config import parse
from nostalgia.experiment.snapshot import Snapshot
from nostalgia.experiment.state import RunState
from nostalgia.models import norm_statistics

RESNET = ["dataset=digits", "model=resnet18", "dataset.image_size=32", "model.pretrained=false"]


def test_stopped_while_an_earlier_task_is_evaluated_the_last_tasks_statistics_are_kept() -> None:
    parts = build_parts(parse(RESNET).config, Accelerator(cpu=True), "32")
    first = norm_statistics.capture(parts.backbone)
    second = {name: value + 1 for name, value in first.items()}
    norm_statistics.apply(parts.backbone, second)
    parts.norm_statistics += [first, second]
    curvature = SimpleNamespace(solve=None, references={}, folder=Path(), state=dict)
    snapshot = Snapshot(parts, curvature, parts.backbone.state_dict())  # type: ignore[arg-type]
    with norm_statistics.using(parts.backbone, first):
        contents = snapshot.take("stopped", RunState(round=2, stage="evaluate"), None, {})
    for name, value in second.items():
        assert torch.equal(contents.tensors[f"ranks/0/norm/{name}"], value), name
