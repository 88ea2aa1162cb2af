"""The images a run began with: recorded beside it, and compared when it goes on or is measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nostalgia.analysis.run_folder import DATA
from nostalgia.config import Config
from nostalgia.data.catalog import CATALOG
from nostalgia.data.fingerprint import difference, fingerprint, names_of
from nostalgia.data.tasks import Task
from nostalgia.errors import NotFoundError
from nostalgia.utils.files import read_json, write_json

CLASS_ORDER = "class_order.json"  # beside it, of experiment.split=classes


def record_data(folder: Path, tasks: Sequence[Task], config: Config) -> None:
    """Write what each task's splits hold, images by name where they are not too many, and the order of the classes of a
    split by them, as experiment.class_order takes it.
    """
    write_json(folder / DATA, {task.name: _splits(task) for task in tasks})
    if config.experiment.tasks is None and config.experiment.split == "classes":
        write_json(folder / CLASS_ORDER, list(dict.fromkeys(name for task in tasks for name in task.classes)))


def check_data(folder: Path, tasks: Sequence[Task], remedy: str) -> None:
    """Raise NotFoundError where a split is not what `record_data` wrote, naming counts and the first few images.

    A run folder without the file, from an earlier version, is taken as it is.
    """
    if not (folder / DATA).is_file():
        return
    then = read_json(folder / DATA)
    for task in tasks:
        for split, now in _splits(task).items():
            before = then.get(task.name, {}).get(split)
            changed = before and difference(before, now, before.get("names"), now["names"])
            if changed:
                raise NotFoundError(
                    f"{task.name}: its {split} images are not those the run began with: {changed}; put them back "
                    f"({task.source}), or {remedy}"
                )


def absolute_paths(config: Config) -> None:
    """Resolve the folders that a configuration names, so that it means the same in another working folder."""
    config.dataset.root = str(Path(config.dataset.root).expanduser().absolute())
    entries = config.dataset.entries
    config.dataset.name = _absolute_data(config.dataset.name, entries)
    if config.experiment.class_order is not None:
        config.experiment.class_order = str(Path(config.experiment.class_order).expanduser().absolute())
    if config.model.model_id is not None:
        config.model.model_id = _absolute(config.model.model_id)
    for i, task in enumerate(config.experiment.tasks or []):
        if isinstance(task, str):
            config.experiment.tasks[i] = _absolute_data(task, entries)  # type: ignore[index]
        elif isinstance(task, dict) and isinstance(task.get("dataset"), str):
            task["dataset"] = _absolute_data(task["dataset"], entries)
    for entry in config.dataset.entries.values():
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            entry["path"] = str(Path(entry["path"]).expanduser().absolute())


def _absolute_data(name: str, entries: Mapping[str, Any]) -> str:
    """A folder that is no data set's name, as an absolute path."""
    return name if name in entries or name in CATALOG else _absolute(name)


def _absolute(name: str) -> str:
    """A name that leads to something here, as an absolute path; any other as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name


def _splits(task: Task) -> dict[str, Any]:
    return {
        split: {**fingerprint(images), "names": names_of(images)}
        for split, images in (("training", task.train), ("validation", task.val))
    }
