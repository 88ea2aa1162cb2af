"""torchvision's data sets, as it downloads and leaves them under ``${dataset.root}``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nostalgia.data.arrays import has_idx, idx
from nostalgia.data.catalog import Entry
from nostalgia.data.folders import scan
from nostalgia.data.images import ArrayImages, FileImages, ImageDataset, Joined
from nostalgia.data.source import Source, make_source
from nostalgia.errors import NotFoundError
from nostalgia.utils.caches import unwritable

Arguments = Mapping[str, Any]
Splits = tuple[tuple[Arguments, ...], tuple[Arguments, ...]]  # (train, val), each read and joined
TRAIN_FLAG: Splits = (({"train": True},), ({"train": False},))
TRAIN_TEST: Splits = (({"split": "train"},), ({"split": "test"},))
TRAIN_VAL_TEST: Splits = (({"split": "train"}, {"split": "val"}), ({"split": "test"},))
WHOLE: Splits = (({},), ())


@dataclass(frozen=True)
class FileSet:
    """Where a torchvision class keeps its files under its root, and the arguments of its two splits."""

    folder: str  # what is there once the data set is
    archive: str  # what is downloaded
    splits: Splits


SETS: dict[str, FileSet] = {
    "MNIST": FileSet("MNIST/raw", "MNIST/raw/train-images-idx3-ubyte.gz", TRAIN_FLAG),
    "FashionMNIST": FileSet("FashionMNIST/raw", "FashionMNIST/raw/train-images-idx3-ubyte.gz", TRAIN_FLAG),
    "CIFAR10": FileSet("cifar-10-batches-py", "cifar-10-python.tar.gz", TRAIN_FLAG),
    "CIFAR100": FileSet("cifar-100-python", "cifar-100-python.tar.gz", TRAIN_FLAG),
    "SVHN": FileSet("train_32x32.mat", "train_32x32.mat", TRAIN_TEST),
    "Flowers102": FileSet("flowers-102/jpg", "flowers-102/102flowers.tgz", TRAIN_VAL_TEST),
    "DTD": FileSet("dtd/dtd/images", "dtd/dtd-r1.0.1.tar.gz", TRAIN_VAL_TEST),
    "Food101": FileSet("food-101/images", "food-101.tar.gz", TRAIN_TEST),
    "EuroSAT": FileSet("eurosat/2750", "eurosat/EuroSAT.zip", WHOLE),
    "Caltech256": FileSet("caltech256/256_ObjectCategories", "caltech256/256_ObjectCategories.tar", WHOLE),
}

#: Where a system's package puts a data set's own files.
SYSTEM = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}


def lives_in(entry: Entry, root: Path, folder: Path) -> bool:
    """Whether what lies in ``folder`` is torchvision's, and to be read as such."""
    if entry.torchvision is None:
        return False
    files = SETS[entry.torchvision]
    base = _home(entry, files, root)
    places = [] if base is None else [base / files.folder, base / files.archive]
    return any(place.exists() and (place == folder or folder in place.parents) for place in places)


def load(entry: Entry, root: Path, val_fraction: float, download: bool) -> tuple[Source | None, str]:
    """The data set from torchvision's files, downloaded where allowed; or why not: broken is not absent."""
    import torchvision.datasets

    assert entry.torchvision is not None
    files = SETS[entry.torchvision]
    found = _home(entry, files, root)
    where = found or root
    label = f"torchvision {entry.torchvision} in {where}"
    installed = SYSTEM.get(entry.torchvision)
    if found is None and installed is not None and has_idx(installed):
        return idx(entry, installed, val_fraction, kind="package"), ""
    if found is None and not download:
        return None, f"{label}: not there"
    if has_idx(where / files.folder):  # MNIST's own files: also where they are still packed
        try:
            return idx(entry, where / files.folder, val_fraction, kind="torchvision"), ""
        except NotFoundError as error:
            if not download:
                return None, f"{label}: {error}"
    kind = getattr(torchvision.datasets, entry.torchvision)
    before = _places(files, where)
    try:
        # torchvision prints to stdout what it downloads; this program's output is its own.
        with contextlib.redirect_stdout(io.StringIO()):
            splits = [[kind(str(where), download=download, **a) for a in arguments] for arguments in files.splits]
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        _remove_empty(where, [place for place in _places(files, where) if place not in before])
        return None, f"{label}: {_why(error, where, files, download)}"
    if has_idx(where / files.folder):
        return idx(entry, where / files.folder, val_fraction, kind="torchvision"), ""
    train, val = ([_read(entry, files, where, s) for s in parts] for parts in splits)
    source = make_source(entry, "torchvision", str(where), _joined(train), _joined(val) if val else None, val_fraction)
    return source, ""


def _home(entry: Entry, files: FileSet, root: Path) -> Path | None:
    """The root under which torchvision's files, or some of them, lie: ``root`` or ``root/<name>``."""
    candidates = (root, root / entry.name)
    return next((c for c in candidates if (c / files.folder).exists() or (c / files.archive).exists()), None)


def _places(files: FileSet, where: Path) -> list[Path]:
    """What is there of a data set."""
    return [where / part for part in (files.folder, files.archive) if (where / part).exists()]


def _remove_empty(root: Path, made: list[Path]) -> None:
    """Folders that a failed download has made and left empty: they would be taken for a broken one."""
    for place in made:
        while place != root and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
            place = place.parent


def _why(error: Exception, where: Path, files: FileSet, download: bool) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if download and (blocked := unwritable(error, where, "dataset.root")):
        return blocked
    for place in _places(files, where):
        return f"{place} is there but broken or partial ({reason}); delete it and download it again"
    return f"download failed ({reason})" if download else f"not there ({reason})"


def _read(entry: Entry, files: FileSet, where: Path, split: Any) -> ImageDataset:
    """One torchvision data set in our form, by attributes of torchvision's (with and without underscore)."""
    if files.splits is WHOLE:
        return scan(entry.name, where / files.folder, entry.drop)
    if hasattr(split, "data"):
        # SVHN keeps (N, 3, H, W) and `labels`, CIFAR (N, H, W, 3) and `targets`.
        svhn = not hasattr(split, "targets")
        images = split.data.transpose(0, 2, 3, 1) if svhn else split.data
        labels = [int(label) for label in (split.labels if svhn else split.targets)]
        return ArrayImages(entry.name, np.asarray(images), labels, _class_names(entry, split))
    paths = [str(path) for path in split._image_files]
    return FileImages(entry.name, paths, [int(label) for label in split._labels], _class_names(entry, split))


def _class_names(entry: Entry, split: Any) -> list[str]:
    return [str(c) for c in getattr(split, "classes", range(entry.classes or 10))]


def _joined(parts: list[ImageDataset]) -> ImageDataset:
    return parts[0] if len(parts) == 1 else Joined(parts)
