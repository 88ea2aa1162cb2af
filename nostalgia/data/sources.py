"""Finds a data set: the user's own folder, what comes installed, torchvision's files. One answer, or one error."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from nostalgia.data import catalog
from nostalgia.data.images import ArrayImages, FileImages, ImageDataset, Subset, stratified_split
from nostalgia.errors import NotFoundError, UsageError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
SPLIT_SEED = 0  # of a held-out split: part of what a data set is, not of a run


@dataclass(frozen=True)
class Source:
    """A data set found: its two splits, which kind of source served it and where."""

    name: str
    kind: str  # embedded, folder or torchvision
    train: ImageDataset
    val: ImageDataset
    where: str
    augment: str


def load_source(
    name: str,
    *,
    root: str | Path = "data",
    val_fraction: float = 0.2,
    entries: Mapping[str, Any] | None = None,
    download: bool = True,
) -> Source:
    """The data set called ``name``: a catalog name, an entry of the user's, or a folder of images.

    Raises UsageError for a name that means nothing, NotFoundError for data that is missing, empty or broken.
    """
    root, entries = Path(root).expanduser(), entries or {}
    folder = Path(name).expanduser()
    if name not in catalog.CATALOG and name not in entries and ("/" in name or folder.is_dir()):
        if not folder.is_dir():
            raise NotFoundError(f"dataset {name}: no such folder; give a catalog name or an existing folder of images")
        return _folder(folder.resolve().name, folder, val_fraction, "crop_flip", None)
    entry = catalog.find(name, entries)
    if entry.path is not None:
        if not Path(entry.path).expanduser().is_dir():
            raise NotFoundError(f"dataset.entries.{name}.path={entry.path}: no such folder")
        return _folder(name, Path(entry.path).expanduser(), val_fraction, entry.augment, entry.classes)
    if entry.embedded:
        return _digits(entry, val_fraction)
    own = root / name
    if entry.idx and (idx := _idx_folder(own, root, entry)) is not None:
        return _idx(entry, idx)
    if own.is_dir():
        return _folder(name, own, val_fraction, entry.augment, entry.classes)
    tried = [f"{own}/ (a folder of class folders): not there"]
    if entry.torchvision is not None:
        found, why = _torchvision(entry, root, download)
        if found is not None:
            return found
        tried.append(why)
    elif any((root / split).is_dir() for split in ("train", "val")):
        return _folder(name, root, val_fraction, entry.augment, entry.classes)
    how = entry.how or f"put the class folders under {own}/train and {own}/val, or set dataset.root"
    raise NotFoundError(f"dataset {name} was not found; tried {'; '.join(tried)}. To get it: {how}")


def _digits(entry: catalog.Entry, val_fraction: float) -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    whole = ArrayImages(entry.name, images, data.target.tolist(), [str(c) for c in range(10)])
    return _split("embedded", whole, "scikit-learn", val_fraction, entry.augment)


def _split(kind: str, whole: ImageDataset, where: str, fraction: float, augment: str) -> Source:
    train, val = stratified_split(whole.labels, fraction, SPLIT_SEED)
    return Source(whole.name, kind, Subset(whole, train), Subset(whole, val), where, augment)


# -- MNIST's idx files -------------------------------------------------------------------------------------------------


def _idx_folder(own: Path, root: Path, entry: catalog.Entry) -> Path | None:
    """Where raw idx files lie: the user's folder, or as torchvision leaves them."""
    for folder in (own, own / "raw", root / str(entry.torchvision) / "raw", root):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    return None


def _idx(entry: catalog.Entry, folder: Path) -> Source:
    names = {
        "mnist": [str(c) for c in range(10)],
        "fashion_mnist": ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                          "Ankle boot"],
    }[entry.name]  # fmt: skip
    splits = []
    for prefix in ("train", "t10k"):
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(names):
            raise NotFoundError(
                f"{folder}: {len(images)} {prefix} images and {len(labels)} labels up to {labels.max(initial=0)} "
                f"do not make {entry.name}; copy the files again"
            )
        splits.append(ArrayImages(entry.name, images, labels.astype(np.int64), names))
    return Source(entry.name, "folder", splits[0], splits[1], str(folder), entry.augment)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An unsigned-byte idx file, plain or gzipped (yann.lecun.com/exdb/mnist)."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise NotFoundError(f"{folder}: {name} (or {name}.gz) is missing beside the others")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise NotFoundError(f"{path}: cannot be read ({error}); it is broken or partial: copy it again") from None
    header = 4 + 4 * dimensions
    magic, shape = data[:4], np.frombuffer(data[4:header], dtype=">u4")
    if magic != bytes([0, 0, 8, dimensions]) or len(data) != header + math.prod(int(n) for n in shape):
        raise NotFoundError(f"{path}: not a whole idx file of {dimensions} dimensions; copy it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape([int(n) for n in shape])


# -- torchvision -------------------------------------------------------------------------------------------------------


def _torchvision(entry: catalog.Entry, root: Path, download: bool) -> tuple[Source | None, str]:
    """torchvision's own files under ``root``, downloaded where allowed; or why not."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, str(entry.torchvision))
    try:
        train, val = (kind(str(root), train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"torchvision.datasets.{entry.torchvision} in {root} (download={str(download).lower()}): {why}"
    splits = [
        ArrayImages(entry.name, np.asarray(s.data), [int(t) for t in s.targets], s.classes) for s in (train, val)
    ]
    return Source(entry.name, "torchvision", splits[0], splits[1], str(root), entry.augment), ""


# -- folders -----------------------------------------------------------------------------------------------------------


def _folder(name: str, folder: Path, fraction: float, augment: str, classes: int | None) -> Source:
    """``folder/{train,val|valid|test}/<class>/*``, or ``folder/<class>/*`` with a stratified split held out."""
    parts = {
        split: next((folder / n for n in names if (folder / n).is_dir()), None) for split, names in SPLITS.items()
    }
    if parts["train"] is None:
        whole = _scan(name, folder)
        _check_classes(whole, classes, folder)
        return _split("folder", whole, str(folder), fraction, augment)
    train = _scan(name, parts["train"])
    _check_classes(train, classes, folder)
    if parts["val"] is None:
        return _split("folder", train, str(parts["train"]), fraction, augment)
    val = _scan(name, parts["val"])
    missing = [c for c in train.classes if c not in val.classes]
    if missing:
        raise NotFoundError(
            f"{parts['val']}: class {missing[0]!r} of {parts['train']} is missing from validation"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; add images of it or remove the class"
        )
    strangers = [c for c in val.classes if c not in train.classes]
    if strangers:
        raise NotFoundError(f"{parts['val']}: class {strangers[0]!r} does not occur in {parts['train']}")
    return Source(name, "folder", train, val, str(folder), augment)


def _scan(name: str, folder: Path) -> FileImages:
    """Class folders in the order of their names; files anywhere below them, each folder visited once."""
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    folded: dict[str, str] = {}
    for c in classes:
        if c.casefold() in folded:
            raise NotFoundError(
                f"{folder}: class folders {folded[c.casefold()]!r} and {c!r} differ only in case; merge or rename one"
            )
        folded[c.casefold()] = c
    paths: list[Path] = []
    labels: list[int] = []
    for label, c in enumerate(classes):
        found = _images_below(folder / c, set())
        if not found:
            raise NotFoundError(f"{folder / c}: class folder without an image ({', '.join(IMG_EXTENSIONS[:4])}, ...)")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise NotFoundError(f"{folder}: empty; expected class folders with images, {folder}/<class>/*.png")
    return FileImages(name, paths, labels, classes)


def _images_below(folder: Path, visited: set[tuple[int, int]]) -> list[Path]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return []  # a loop of links
    visited.add((status.st_dev, status.st_ino))
    found = []
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        raise NotFoundError(f"{folder}: cannot be read ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _images_below(Path(entry.path), visited)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            found.append(Path(entry.path))
    return found


def _check_classes(found: ImageDataset, expected: int | None, folder: Path) -> None:
    counts = torch.bincount(found.labels, minlength=len(found.classes))
    if int(counts.min()) < 2:
        c = found.classes[int(counts.argmin())]
        raise NotFoundError(f"{folder}: class {c!r} has {int(counts.min())} image; two or more are needed")
    if expected is not None and len(found.classes) != expected:
        raise UsageError(
            f"{folder}: {len(found.classes)} classes where {found.name} has {expected}; for a data set of your own "
            f"use its path as the name, or dataset.entries.{found.name}.classes={len(found.classes)}"
        )
