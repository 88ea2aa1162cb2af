"""What a run is made of, from its configuration."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from nostalgia.experiment.setup import load_tasks, task_loader

from nostalgia.config import parse
from nostalgia.data.prepared import View


def test_tasks_trained_together_keep_their_own_augmentation() -> None:
    accelerator, words = Accelerator(cpu=True), ["dataset=digits", "model=vit_tiny", "method=joint"]
    config = parse(words).config
    first, second = load_tasks(config, accelerator)
    tasks = [dataclasses.replace(first, augment="flip"), dataclasses.replace(second, augment="none")]
    view = View(8, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    together = task_loader(config, accelerator, view, tasks, train=True, name="joint")
    assert together.augmentation.policies == ("flip", "none")
    chosen = parse([*words, "dataset.augment=shift"]).config
    assert task_loader(chosen, accelerator, view, tasks, train=True).augmentation.policies == ("shift", "shift")
