"""Tasks: what the configuration's list means, and the data sets it stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nostalgia.data.images import ImageDataset, Subset
from nostalgia.data.source import Source
from nostalgia.data.transforms import check_shifts
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.options import nearest

DEFAULT_TASKS = 2
KEYS = ("dataset", "classes", "transform", "head")  # of an entry of the task list


@dataclass(frozen=True)
class TaskSpec:
    """One entry of the task list."""

    dataset: str
    classes: tuple[int | str, ...] | None = None  # indices or names; None: all
    transform: tuple[str, ...] = ()  # domain shifts, in order
    part: tuple[int, int] | None = None  # (i, n): the i-th of n disjoint parts of the classes, i from 0
    head: str | None = None  # name of an earlier task whose head goes on; None: a head of its own
    order: tuple[int | str, ...] | None = None  # of the classes, for parts; None: by the seed


@dataclass(frozen=True)
class Task:
    """A task with its data; labels count from 0 over its own classes.

    Where it goes on with the head of an earlier task, ``classes`` are that task's, then its own that are new:
    the head's outputs. A class is the same where its name is.
    """

    index: int  # from 1
    name: str  # task1_digits
    dataset: str
    classes: tuple[str, ...]
    train: ImageDataset
    val: ImageDataset
    transform: tuple[str, ...]
    augment: str
    source: str  # "embedded: scikit-learn"
    head: str  # name of the first task with this head: its own, or an earlier one
    notes: tuple[str, ...] = ()  # on its data: what is held out, what is left out


def data_notes(tasks: Sequence[Task]) -> list[str]:
    """What is to be said of the tasks' data, each thing once."""
    said = list(dict.fromkeys(f"{task.dataset}: {note}" for task in tasks for note in task.notes))
    outputs = head_classes(tasks)
    single = [task.name for task in tasks if len(outputs[task.head]) == 1]
    if single:
        which = single[0] if len(single) == 1 else f"{single[0]} and {len(single) - 1} more"
        said.append(
            f"{which}: a single class under its own head, which is always right whatever the network does; see "
            "class-incremental accuracy, or experiment.head=shared"
        )
    return said


def expand_specs(
    tasks: Sequence[Any] | None,
    dataset: str,
    num_tasks: int | None = None,
    split: str = "none",
    *,
    shared_head: bool = False,
    class_order: str | None = None,
) -> list[TaskSpec]:
    """The task list: as given, or ``dataset`` several times, or its classes in disjoint parts.

    Parts share one growing head with ``shared_head``; ``class_order`` is a JSON file with the order in which they take
    the classes.
    """
    if tasks is None:
        count = DEFAULT_TASKS if num_tasks is None else num_tasks
        if split != "classes":
            return [TaskSpec(dataset) for _ in range(count)]
        order = None if class_order is None else read_class_order(Path(class_order))
        first = task_name(1, dataset) if shared_head else None
        return [TaskSpec(dataset, part=(i, count), head=first if i else None, order=order) for i in range(count)]
    if not tasks:
        raise UsageError("experiment.tasks=[]: name at least one task, such as experiment.tasks=[digits]")
    return [_spec(i, entry) for i, entry in enumerate(tasks, 1)]


def build_tasks(specs: Sequence[TaskSpec], load: Callable[[str], Source], seed: int) -> list[Task]:
    """Load each data set once and cut the tasks out of it; ``seed`` orders classes for a split by them."""
    sources: dict[str, Source] = {}
    tasks: list[Task] = []
    for index, spec in enumerate(specs, 1):
        check_shifts(spec.transform)
        if spec.dataset not in sources:
            sources[spec.dataset] = load(spec.dataset)
        tasks.append(_task(index, spec, sources[spec.dataset], seed, tasks))
    return tasks


@dataclass(frozen=True)
class Missing:
    """A task whose data, or whose head's, is not there."""

    index: int
    name: str
    dataset: str
    why: str
    head: str | None = None


def find_tasks(specs: Sequence[TaskSpec], load: Callable[[str], Source], seed: int) -> list[Task | Missing]:
    """As `build_tasks`, going on where the data of a task is missing."""
    sources: dict[str, Source | NotFoundError] = {}
    found: list[Task | Missing] = []
    for index, spec in enumerate(specs, 1):
        check_shifts(spec.transform)
        if spec.dataset not in sources:
            try:
                sources[spec.dataset] = load(spec.dataset)
            except NotFoundError as error:
                sources[spec.dataset] = error
        source, tasks = sources[spec.dataset], [task for task in found if isinstance(task, Task)]
        lost = next((one for one in found if isinstance(one, Missing) and one.name == spec.head), None)
        if isinstance(source, NotFoundError):
            found.append(Missing(index, task_name(index, spec.dataset), spec.dataset, str(source), spec.head))
        elif lost is not None:
            name = task_name(index, source.name)
            found.append(Missing(index, name, spec.dataset, f"it goes on with the head of {lost.name}", lost.name))
        else:
            found.append(_task(index, spec, source, seed, tasks))
    return found


def task_name(index: int, dataset: str) -> str:
    """``task1_digits``; of a repository or a folder the last part of its name."""
    last = re.split(r"[/\\:]", dataset.rstrip("/\\"))[-1]
    return f"task{index}_{re.sub(r'[^A-Za-z0-9_-]', '_', last)[:64]}"


def read_class_order(path: Path) -> tuple[int | str, ...]:
    """Class names or indices from a JSON list in a file; raises NotFoundError where it is not one."""
    try:
        order = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotFoundError(f"experiment.class_order={path}: cannot be read ({error})") from None
    if not isinstance(order, list) or not order or not all(isinstance(c, (int, str)) for c in order):
        raise NotFoundError(f"experiment.class_order={path}: expected is a JSON list of class names or indices")
    return tuple(order)


def head_classes(tasks: Sequence[Task]) -> dict[str, tuple[str, ...]]:
    """What the outputs of each head stand for once all ``tasks`` are trained, by its name."""
    return {task.head: task.classes for task in tasks}  # the last one with a head has all of its classes


def _spec(index: int, entry: Any) -> TaskSpec:
    where = f"experiment.tasks[{index}]"
    if isinstance(entry, str):
        return TaskSpec(entry)
    if not isinstance(entry, dict) or "dataset" not in entry:
        raise UsageError(
            f"{where}={entry}: allowed are a data set's name and {{dataset:, classes:, transform:, head:}}"
        )
    for key in entry:
        if key not in KEYS:
            raise UsageError(f"{where}: unknown key {key!r}; allowed are {', '.join(KEYS)}")
    classes, transform = entry.get("classes"), entry.get("transform") or []
    if classes is not None and (not isinstance(classes, list) or not classes):
        raise UsageError(f"{where}: classes={classes}; allowed is a list of class indices or names")
    transform = [transform] if isinstance(transform, str) else transform
    if not isinstance(transform, list) or not all(isinstance(one, str) for one in transform):
        raise UsageError(f"{where}: transform={transform}; allowed is the name of a shift, or a list of names")
    check_shifts(transform)
    head = entry.get("head")
    if head is not None and not isinstance(head, str):
        raise UsageError(f"{where}: head={head}; allowed is the name of an earlier task, such as task1_digits")
    return TaskSpec(str(entry["dataset"]), None if classes is None else tuple(classes), tuple(transform), head=head)


def _task(index: int, spec: TaskSpec, source: Source, seed: int, earlier: Sequence[Task]) -> Task:
    name = task_name(index, source.name)
    classes = _classes(name, spec, source, seed)
    train, val = (_only(split, classes) for split in (source.train, source.val))  # each class is in both
    head = name
    if spec.head is not None:
        known = {task.name: task.head for task in earlier}
        if spec.head not in known:
            there = f"there are {', '.join(known)}" if known else "it is the first"
            raise UsageError(f"{name}: head={spec.head} is no earlier task; {there}")
        head = known[spec.head]
        rows = head_classes(earlier)[head]
        rows += tuple(c for c in train.classes if c not in rows)
        train, val = train.counted_over(rows), val.counted_over(rows)
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
        notes=(*source.notes, *_left_out(spec, source)),
        head=head,
    )


def _classes(name: str, spec: TaskSpec, source: Source, seed: int) -> list[int]:
    """Indices of the task's classes within the source."""
    all_classes = source.train.classes
    if spec.part is not None:
        i, n = spec.part
        if spec.order is None:
            order = torch.randperm(len(all_classes), generator=torch.Generator().manual_seed(seed))
        else:
            order = torch.tensor(_indices(name, spec.order, source))
        if n > len(order):
            those = source.name if spec.order is None else f"experiment.class_order of {source.name}"
            raise UsageError(
                f"experiment.num_tasks={n} with experiment.split=classes: {those} has {len(order)} classes"
            )
        return sorted(order.tensor_split(n)[i].tolist())
    if spec.classes is None:
        return list(range(len(all_classes)))
    return _indices(name, spec.classes, source)


def _left_out(spec: TaskSpec, source: Source) -> tuple[str, ...]:
    """A line where the order of a split by classes does not name all of them."""
    total = len(source.train.classes)
    if spec.order is None or len(spec.order) == total:
        return ()
    return (f"{total - len(spec.order)} of {total} classes are in no task: experiment.class_order",)


def _indices(name: str, classes: Sequence[int | str], source: Source) -> list[int]:
    """Indices within the source of ``classes``, given as indices or names."""
    all_classes = source.train.classes
    chosen = []
    for c in classes:
        if isinstance(c, int) and not isinstance(c, bool) and 0 <= c < len(all_classes):
            chosen.append(c)
        elif isinstance(c, str) and c in all_classes:
            chosen.append(all_classes.index(c))
        else:
            raise UsageError(
                f"{name}: class {c!r} is not in {source.name}{nearest(str(c), all_classes)}; allowed are indices 0 to "
                f"{len(all_classes) - 1}, and class names"
            )
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"{name}: classes={list(classes)} names a class twice")
    return chosen


def _only(split: ImageDataset, classes: list[int]) -> Subset:
    wanted: Tensor = torch.isin(split.labels, torch.tensor(classes))
    return Subset(split, wanted.nonzero().flatten(), classes)
