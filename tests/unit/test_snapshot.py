"""What a checkpoint takes of a run that is stopped where its parts are not as they will go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.experiment.components import build_components
from nostalgia.experiment.snapshot import Snapshot
from nostalgia.experiment.state import RunState
from nostalgia.models import norm_statistics

RESNET = ["dataset=digits", "model=resnet18", "dataset.image_size=32", "model.pretrained=false"]


def test_stopped_while_an_earlier_task_is_evaluated_the_last_tasks_statistics_are_kept() -> None:
    run = build_components(parse(RESNET).config, Accelerator(cpu=True), "32")
    first = norm_statistics.capture(run.backbone)
    second = {name: value + 1 for name, value in first.items()}
    norm_statistics.apply(run.backbone, second)
    run.norm_statistics += [first, second]
    analysis = SimpleNamespace(state=dict)
    snapshot = Snapshot(run, analysis, run.backbone.state_dict(), Path())  # type: ignore[arg-type]
    with norm_statistics.using(run.backbone, first):
        contents = snapshot.take("stopped", RunState(round=2, stage="evaluate"), None, {})
    for name, value in second.items():
        assert torch.equal(contents.tensors[f"ranks/0/norm/{name}"], value), name
