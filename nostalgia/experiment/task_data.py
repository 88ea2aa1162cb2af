"""The tasks that the configuration names, with their data, and the batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from nostalgia.config.schema import Config
from nostalgia.data import hub
from nostalgia.data.folders import class_folders
from nostalgia.data.images import ArrayImages, Subset
from nostalgia.data.sources import Source, load_source
from nostalgia.data.stream import Prepared, TaskLoader, View
from nostalgia.data.tasks import Missing, Task, TaskSpec, build_tasks, expand_specs
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.parallel.coordination import main_first


def load_tasks(config: Config, accelerator: Accelerator) -> list[Task]:
    """The run's tasks with their data; rank 0 alone downloads, and first. A collective."""
    download, seed = config.dataset.download, config.experiment.seed
    return main_first(
        accelerator,
        lambda is_main: build_tasks(task_specs(config), source_loader(config, download and is_main), seed),
    )


def task_specs(config: Config) -> list[TaskSpec]:
    experiment = config.experiment
    return expand_specs(
        experiment.tasks,
        config.dataset.name,
        experiment.num_tasks,
        experiment.split,
        shared_head=experiment.head == "shared",
        class_order=experiment.class_order,
    )


def source_loader(config: Config, download: bool) -> Callable[[str], Source]:
    """Finds a data set by name, where the configuration says."""
    dataset = config.dataset
    return lambda name: load_source(
        name,
        root=dataset.root,
        val_fraction=dataset.val_fraction,
        entries=dataset.entries,
        download=download,
    )


def placeholder(one: Missing) -> Task:
    """Stands for a task whose data is missing, without images or classes."""
    nothing = ArrayImages(one.dataset, np.zeros((0, 1, 1)), [], [])
    return Task(
        index=one.index,
        name=one.name,
        dataset=one.dataset,
        classes=(),
        train=nothing,
        val=nothing,
        transform=(),
        augment="none",
        source="missing",
        head=one.head or one.name,
    )


def task_loader(
    config: Config,
    accelerator: Accelerator,
    view: View,
    tasks: list[Task],
    train: bool,
    name: str | None = None,
    heads: Sequence[int] | None = None,
) -> TaskLoader:
    """Batches of one task, or of several together, for this rank."""
    dataset = config.dataset
    images = Prepared([t.train if train else t.val for t in tasks], [t.transform for t in tasks], view.resizing)
    return TaskLoader(
        images,
        view,
        name=name or tasks[0].name,
        per_device_batch_size=dataset.batch_size,
        train=train,
        accumulation_steps=config.train.gradient_accumulation_steps if train else 1,
        seed=config.experiment.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=dataset.num_workers,
        augment=augmentations(config, tasks),
        heads=heads,
        stratified=not train and config.train.max_eval_batches is not None,
    )


def augmentations(config: Config, tasks: Sequence[Task]) -> list[str]:
    """The augmentation policy of each task's training images."""
    chosen = config.dataset.augment
    return [task.augment if chosen == "default" else chosen for task in tasks]


def folder_task(config: Config, folder: Path, name: str, every: Mapping[str, Sequence[str]]) -> Task:
    """The images of a folder as those of the task ``name`` of a run; ``every`` gives the classes of all its tasks by name.

    Raises NotFoundError for class folders that the task does not know, UsageError for a folder without any by design.
    """
    if hub.on_disk(folder):
        raise UsageError(
            f"{folder}: a data set as `datasets` keeps it; allowed is a folder of class folders, <class>/*"
        )
    names, classes = list(every), every[name]
    train, val = class_folders(folder.resolve().name, folder)
    images = train if val is None else val
    unknown = [c for c in images.classes if c not in classes]
    if unknown:
        listed = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise NotFoundError(
            f"{folder}: class folders {listed} are no classes of {name}; it knows {', '.join(classes[:12])}"
            f"{', ...' if len(classes) > 12 else ''}"
        )
    own = Subset(images, torch.arange(len(images))).counted_over(classes)
    spec = task_specs(config)[names.index(name)]
    return Task(
        index=names.index(name) + 1,
        name=name,
        dataset=images.name,
        classes=tuple(classes),
        train=own,
        val=own,
        transform=spec.transform,
        augment="none",
        source=f"folder: {folder}",
        head=name,
    )
