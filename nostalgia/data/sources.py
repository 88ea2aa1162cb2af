"""Finds a data set: the user's own folder, what comes installed, the hub, torchvision.

What is on this machine comes before what must be downloaded: the user's folder, the hub's cache,
torchvision's files; then, where downloads are allowed, the hub and torchvision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    root, entries = Path(root).expanduser(), entries or {}
    if name.startswith("hf:"):
        return _fetched(_hub_entry(name), root, val_fraction, download, [])
    entry = catalog.find(name, entries)
    if entry is None:
        return _own_folder(name, entries, val_fraction)
    if entry.path is not None:
        folder = Path(entry.path).expanduser()
        if not folder.is_dir():
            raise NotFoundError(f"dataset.entries.{name}.path={entry.path}: no such folder")
        return folder_source(entry, folder, val_fraction)
    if entry.embedded:
        return arrays.digits(entry, val_fraction)
    tried: list[str] = []
    found = _under_root(entry, root, val_fraction, tried)
    return found if found is not None else _fetched(entry, root, val_fraction, download, tried)


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


def _own_folder(name: str, entries: Mapping[str, Any], val_fraction: float) -> Source:
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
    folder_name = folder.resolve().name or "root"
    if arrays.has_idx(folder):
        # fashion-mnist is Fashion-MNIST: the files do not carry the names of its classes.
        known = catalog.CATALOG.get(folder_name.lower().replace("-", "_"), Entry(folder_name, augment="shift"))
        return arrays.idx(known, folder, val_fraction)
    return folder_source(Entry(folder_name), folder, val_fraction)


def _hub_entry(name: str) -> Entry:
    identifier = name.removeprefix("hf:")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", identifier) or ".." in identifier:
        raise UsageError(f"dataset {name!r}: allowed is hf:user/name, such as hf:uoft-cs/cifar100")
    return Entry(identifier.rpartition("/")[2], hub=(Hub(identifier),))


def _under_root(entry: Entry, root: Path, val_fraction: float, tried: list[str]) -> Source | None:
    """The user's own data under ``root``: ``<name>/``, its usual folder, or ``train/`` and ``val/``."""
    for folder in (root / name for name in (entry.name, *entry.folders)):
        if not folder.is_dir() or torchvision_files.lives_in(entry, root, folder):
            continue
        if not is_empty(folder):
            return folder_source(entry, folder, val_fraction)
        tried.append(f"folder {folder}: empty")
    if not tried:
        tried.append(f"folder {root / entry.name}: not there")
    if entry.idx and arrays.has_idx(root):
        return arrays.idx(entry, root, val_fraction)
    if (root / "train").is_dir():
        train, val = class_folders(entry.name, root)
        if entry.classes is None or len(train.classes) == entry.classes:
            notes = train.notes if val is None else (*train.notes, *val.notes)
            return make_source(entry, "folder", str(root), train, val, val_fraction, notes)
        tried.append(f"folder {root / 'train'}: {len(train.classes)} classes, not {entry.classes}")
    return None


def _fetched(entry: Entry, root: Path, val_fraction: float, download: bool, tried: list[str]) -> Source:
    """From the hub or torchvision: first what both have on this machine, then by download."""
    reasons: list[str] = []
    for downloads in (False, True) if download else (False,):
        reasons = []
        for repository in entry.hub:
            try:
                found, why = hub.from_hub(entry, repository, val_fraction, downloads)
            except UsageError as error:
                if entry.name not in catalog.CATALOG:
                    raise
                found, why = None, str(error)  # the next source may serve
            if found is not None:
                return found
            reasons.append(why)
        if entry.torchvision is not None:
            found, why = torchvision_files.load(entry, root, val_fraction, downloads)
            if found is not None:
                return found
            reasons.append(why)
    if not download:
        reasons.append("downloads: off (dataset.download=false), or the first rank's alone")
    raise NotFoundError(_not_found(entry, root, [*tried, *reasons]))


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
