"""Tasks: what the configuration's list means, and the data sets it stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nostalgia.data.images import ImageDataset, Subset
from nostalgia.data.source import Source
from nostalgia.data.transforms import check_shifts
from nostalgia.errors import UsageError

DEFAULT_TASKS = 2


@dataclass(frozen=True)
class TaskSpec:
    """One entry of the task list."""

    dataset: str
    classes: tuple[int | str, ...] | None = None  # indices or names; None: all
    transform: tuple[str, ...] = ()  # domain shifts, in order
    part: tuple[int, int] | None = None  # (i, n): the i-th of n disjoint parts of the classes, i from 0


@dataclass(frozen=True)
class Task:
    """A task with its data; labels count from 0 over its own classes."""

    index: int  # from 1
    name: str  # task1_digits
    dataset: str
    classes: tuple[str, ...]
    train: ImageDataset
    val: ImageDataset
    transform: tuple[str, ...]
    augment: str
    source: str  # "embedded: scikit-learn"


def expand_specs(
    tasks: Sequence[Any] | None, dataset: str, num_tasks: int | None = None, split: str = "none"
) -> list[TaskSpec]:
    """The task list: as given, or ``dataset`` several times, or its classes in disjoint parts."""
    if tasks is None:
        count = DEFAULT_TASKS if num_tasks is None else num_tasks
        parts = [(i, count) if split == "classes" else None for i in range(count)]
        return [TaskSpec(dataset, part=part) for part in parts]
    if not tasks:
        raise UsageError("experiment.tasks=[]: name at least one task, such as experiment.tasks=[digits]")
    return [_spec(i, entry) for i, entry in enumerate(tasks, 1)]


def build_tasks(specs: Sequence[TaskSpec], load: Callable[[str], Source], seed: int) -> list[Task]:
    """Load each data set once and cut the tasks out of it; ``seed`` orders classes for a split by them."""
    sources: dict[str, Source] = {}
    tasks = []
    for index, spec in enumerate(specs, 1):
        check_shifts(spec.transform)
        if spec.dataset not in sources:
            sources[spec.dataset] = load(spec.dataset)
        tasks.append(_task(index, spec, sources[spec.dataset], seed))
    return tasks


def _spec(index: int, entry: Any) -> TaskSpec:
    where = f"experiment.tasks[{index}]"
    if isinstance(entry, str):
        return TaskSpec(entry)
    if not isinstance(entry, dict) or "dataset" not in entry:
        raise UsageError(f"{where}={entry}: allowed are a data set's name and {{dataset:, classes:, transform:}}")
    for key in entry:
        if key not in ("dataset", "classes", "transform"):
            raise UsageError(f"{where}: unknown key {key!r}; allowed are dataset, classes, transform")
    classes, transform = entry.get("classes"), entry.get("transform") or []
    if classes is not None and (not isinstance(classes, list) or not classes):
        raise UsageError(f"{where}: classes={classes}; allowed is a list of class indices or names")
    transform = [transform] if isinstance(transform, str) else list(transform)
    check_shifts(transform)
    return TaskSpec(str(entry["dataset"]), None if classes is None else tuple(classes), tuple(transform))


def _task(index: int, spec: TaskSpec, source: Source, seed: int) -> Task:
    name = f"task{index}_{re.sub(r'[^A-Za-z0-9_-]', '_', source.name)[:64]}"
    classes = _classes(name, spec, source, seed)
    train, val = (_only(split, classes) for split in (source.train, source.val))  # each class is in both
    return Task(
        index=index,
        name=name,
        dataset=source.name,
        classes=train.classes,
        train=train,
        val=val,
        transform=spec.transform,
        augment=source.augment,
        source=f"{source.kind}: {source.where}",
    )


def _classes(name: str, spec: TaskSpec, source: Source, seed: int) -> list[int]:
    """Indices of the task's classes within the source."""
    all_classes = source.train.classes
    if spec.part is not None:
        i, n = spec.part
        if n > len(all_classes):
            raise UsageError(
                f"experiment.num_tasks={n} with experiment.split=classes: {source.name} has {len(all_classes)} classes"
            )
        order = torch.randperm(len(all_classes), generator=torch.Generator().manual_seed(seed))
        return sorted(order.tensor_split(n)[i].tolist())
    if spec.classes is None:
        return list(range(len(all_classes)))
    chosen = []
    for c in spec.classes:
        if isinstance(c, int) and not isinstance(c, bool) and 0 <= c < len(all_classes):
            chosen.append(c)
        elif isinstance(c, str) and c in all_classes:
            chosen.append(all_classes.index(c))
        else:
            close = difflib.get_close_matches(str(c), all_classes, n=1)
            hint = f"; did you mean {close[0]}?" if close else ";"
            raise UsageError(
                f"{name}: class {c!r} is not in {source.name}{hint} allowed are indices 0 to "
                f"{len(all_classes) - 1}, and class names"
            )
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"{name}: classes={list(spec.classes)} names a class twice")
    return chosen


def _only(split: ImageDataset, classes: list[int]) -> Subset:
    wanted: Tensor = torch.isin(split.labels, torch.tensor(classes))
    return Subset(split, wanted.nonzero().flatten(), classes)
