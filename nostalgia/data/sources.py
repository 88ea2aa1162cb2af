"""Finds a data set: the user's own folder, what comes installed, the hub, torchvision.

A name becomes an entry, and the kinds of source are asked in turn (`LOCAL`, then `FETCHED`): what is on this machine comes
before what must be downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nostalgia.data import arrays, catalog, hub, layouts, torchvision_files
from nostalgia.data.catalog import Entry, Hub
from nostalgia.data.folders import class_folders, is_empty
from nostalgia.data.source import Source, make_source
from nostalgia.errors import NotFoundError, UsageError

__all__ = ["Source", "load_source"]

MAX_LINES = 12  # of an error
ARCHIVE_FOLDERS = ("CUB_200_2011", "tiny-imagenet-200", "256_ObjectCategories", "imagenet-r", "imagenet-a")


@dataclass(frozen=True)
class Places:
    """Where a data set may be: under ``root``, and elsewhere where ``download`` allows; how it is split without a split."""

    root: Path
    val_fraction: float
    download: bool


Kind = Callable[
    [Entry, Places], "Source | list[str]"
]  # what was found, or lines that say why not: none where it is no such kind


def load_source(
    name: str,
    *,
    root: str | Path = "data",
    val_fraction: float = 0.2,
    entries: Mapping[str, Any] | None = None,
    download: bool = True,
) -> Source:
    """The data set ``name``: a catalog name, an entry of the user's, ``hf:user/name``, or a folder of images.

    Of several ranks one calls this with ``download=True`` before the others do with ``download=False``.
    Raises UsageError for a name that means nothing, NotFoundError for data that is missing, empty or broken.
    """
    places, entries = Places(Path(root).expanduser(), val_fraction, download), entries or {}
    if name.startswith("hf:"):
        return _first_found(FETCHED, _hub_entry(name), places)
    entry = catalog.find(name, entries) or _folder_entry(name, entries)
    if entry.path is not None and not Path(entry.path).expanduser().is_dir():
        raise NotFoundError(f"dataset.entries.{name}.path={entry.path}: no such folder")
    return _first_found((*LOCAL, *FETCHED), entry, places)


def _first_found(kinds: Sequence[Kind], entry: Entry, places: Places) -> Source:
    tried: list[str] = []
    for kind in kinds:
        found = kind(entry, places)
        if isinstance(found, Source):
            return found
        tried += found
    if not places.download:
        tried.append("downloads: off (dataset.download=false), or the first rank's alone")
    raise NotFoundError(_not_found(entry, places.root, tried))


def _folder_entry(name: str, entries: Mapping[str, Any]) -> Entry:
    """The entry of a folder that is given by its path."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"dataset {name!r}: a file, not a folder of images")
        if "/" in name or "\\" in name or ".." in name:
            raise UsageError(
                f"dataset {name!r}: no such folder; give an existing folder of images, hf:user/name for the hub, "
                f"or one of {', '.join(sorted(catalog.CATALOG))}"
            )
        raise catalog.unknown(name, entries)
    entry = Entry(folder.resolve().name or "root")
    if arrays.has_idx(folder):
        # fashion-mnist is Fashion-MNIST: the files do not carry the names of its classes.
        entry = catalog.CATALOG.get(entry.name.lower().replace("-", "_"), replace(entry, augment="shift"))
    return replace(entry, path=str(folder))


def _hub_entry(name: str) -> Entry:
    identifier = name.removeprefix("hf:")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", identifier) or ".." in identifier:
        raise UsageError(f"dataset {name!r}: allowed is hf:user/name, such as hf:uoft-cs/cifar100")
    return Entry(identifier.rpartition("/")[2], hub=(Hub(identifier),))


def folder_source(entry: Entry, folder: Path, val_fraction: float) -> Source:
    """A folder of the user's, in whichever layout: idx files, a hub data set, lists, or class folders."""
    if arrays.has_idx(folder):
        return arrays.idx(entry, folder, val_fraction)
    if hub.on_disk(folder):
        return hub.from_disk(entry, folder, val_fraction)
    # An archive makes a folder of its own in the one it is unpacked in, as in cub200/CUB_200_2011.
    unpacked = [folder, *(folder / name for name in ARCHIVE_FOLDERS if (folder / name).is_dir())]
    for inner in unpacked:
        found = layouts.recognised(entry.name, inner, entry.domain)
        if found is not None:
            return make_source(entry, "folder", str(inner), *found, val_fraction)
    train, val = class_folders(entry.name, unpacked[-1], entry.drop)
    notes = train.notes if val is None else (*train.notes, *val.notes)
    return make_source(entry, "folder", str(unpacked[-1]), train, val, val_fraction, notes)


# -- kinds of source, in the order they are asked ----------------------------------------------------------------------


def _own_path(entry: Entry, places: Places) -> Source | list[str]:
    if entry.path is None:
        return []
    return folder_source(entry, Path(entry.path).expanduser(), places.val_fraction)


def _embedded(entry: Entry, places: Places) -> Source | list[str]:
    return arrays.digits(entry, places.val_fraction) if entry.embedded else []


def _folder_under_root(entry: Entry, places: Places) -> Source | list[str]:
    """``<root>/<name>/``, or its usual folder."""
    tried = []
    for folder in (places.root / name for name in (entry.name, *entry.folders)):
        if not folder.is_dir() or torchvision_files.lives_in(entry, places.root, folder):
            continue
        if not is_empty(folder):
            return folder_source(entry, folder, places.val_fraction)
        tried.append(f"folder {folder}: empty")
    return tried or [f"folder {places.root / entry.name}: not there"]


def _idx_in_root(entry: Entry, places: Places) -> Source | list[str]:
    return arrays.idx(entry, places.root, places.val_fraction) if entry.idx and arrays.has_idx(places.root) else []


def _splits_in_root(entry: Entry, places: Places) -> Source | list[str]:
    """``<root>/train/`` and ``<root>/val/``, where they have the data set's number of classes."""
    if not (places.root / "train").is_dir():
        return []
    train, val = class_folders(entry.name, places.root)
    if entry.classes is None or len(train.classes) == entry.classes:
        notes = train.notes if val is None else (*train.notes, *val.notes)
        return make_source(entry, "folder", str(places.root), train, val, places.val_fraction, notes)
    return [f"folder {places.root / 'train'}: {len(train.classes)} classes, not {entry.classes}"]


def _hub(entry: Entry, places: Places, *, downloads: bool) -> Source | list[str]:
    tried = []
    for repository in entry.hub:
        try:
            found, why = hub.from_hub(entry, repository, places.val_fraction, downloads)
        except UsageError as error:
            if entry.name not in catalog.CATALOG:
                raise
            found, why = None, str(error)  # the next source may serve
        if found is not None:
            return found
        tried.append(why)
    return tried


def _torchvision(entry: Entry, places: Places, *, downloads: bool) -> Source | list[str]:
    if entry.torchvision is None:
        return []
    found, why = torchvision_files.load(entry, places.root, places.val_fraction, downloads)
    return [why] if found is None else found


def _here(kind: Callable[..., Source | list[str]]) -> Kind:
    """What ``kind`` has on this machine already; why it has not is said by `_downloaded`, where that will be asked."""

    def ask(entry: Entry, places: Places) -> Source | list[str]:
        found = kind(entry, places, downloads=False)
        return [] if places.download and isinstance(found, list) else found

    return ask


def _downloaded(kind: Callable[..., Source | list[str]]) -> Kind:
    return lambda entry, places: kind(entry, places, downloads=True) if places.download else []


LOCAL: tuple[Kind, ...] = (_own_path, _embedded, _folder_under_root, _idx_in_root, _splits_in_root)
FETCHED: tuple[Kind, ...] = (_here(_hub), _here(_torchvision), _downloaded(_hub), _downloaded(_torchvision))


def _not_found(entry: Entry, root: Path, tried: list[str]) -> str:
    how = entry.how or f"put class folders under {root / entry.name}/train and {root / entry.name}/val"
    if entry.name in catalog.CATALOG:
        how += ", or run once where there is a network: it is downloaded"
    if entry.name not in catalog.CATALOG and entry.hub:
        how = "check the name at huggingface.co/datasets; a private or gated one needs hf auth login"
    lines = [
        f"dataset {entry.name} was not found; tried",
        *(f"  {line}" for line in tried[: MAX_LINES - 2]),
        f"to get it: {how}".replace("${dataset.root}", str(root)),
    ]
    return "\n".join(lines)
