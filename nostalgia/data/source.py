"""A data set found, whatever served it: two splits over the same classes, checked in one place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nostalgia.data.catalog import Entry
from nostalgia.data.imagenet import SUBSETS
from nostalgia.data.images import ImageDataset, Subset
from nostalgia.errors import NotFoundError

SPLIT_SEED = 0  # of a held-out split: part of what a data set is, not of a run


@dataclass(frozen=True)
class Source:
    """A data set found: its two splits, which kind of source served it and where."""

    name: str
    kind: str  # embedded, folder, hub or torchvision
    train: ImageDataset
    val: ImageDataset
    where: str
    augment: str
    notes: tuple[str, ...] = ()  # what a reader of the results should know


def make_source(
    entry: Entry,
    kind: str,
    where: str,
    train: ImageDataset,
    val: ImageDataset | None,
    val_fraction: float,
    notes: Sequence[str] = (),
) -> Source:
    """Check the splits against each other and the catalog; hold a part of ``train`` out without a ``val``.

    Raises NotFoundError: a split without images, a class missing from validation or unknown to training,
    one too small to be split, a number of classes that is not the catalog's.
    """
    for split, images in (("training", train), ("validation", val)):
        if images is not None and len(images) == 0:
            raise NotFoundError(f"{where}: the {split} split of {entry.name} has no images")
    if len(train.classes) == 1 and entry.classes != 1:
        raise NotFoundError(
            f"{where}: a single class, {train.classes[0]!r}: nothing to tell apart; if its folders are the classes, give its "
            "path, and if it is meant, dataset.entries.NAME.classes=1"
        )
    counts = torch.bincount(train.labels, minlength=len(train.classes))
    least = int(counts.argmin())
    if counts[least] == 0:
        raise NotFoundError(f"{where}: class {train.classes[least]!r} of {entry.name} has no training image")
    if entry.classes is not None and len(train.classes) != entry.classes:
        raise NotFoundError(
            f"{where}: {len(train.classes)} classes where {entry.name} has {entry.classes}: incomplete, or not "
            f"{entry.name}; a data set of your own goes by its path, or by dataset.entries.<name>"
        )
    _check_wnids(entry, where, train.classes)
    if val is not None:
        val = _aligned(where, train, val)
        return Source(entry.name, kind, train, val, where, entry.augment, tuple(notes))
    if counts[least] < 2:
        raise NotFoundError(
            f"{where}: class {train.classes[least]!r} has {int(counts[least])} image; two or more are needed, "
            "because a part of each class is held out for validation"
        )
    kept, held_out = stratified_split(train.labels, val_fraction, SPLIT_SEED)
    notes = (*notes, f"validation: {len(held_out)} of {len(train)} images held out, by class")
    return Source(entry.name, kind, Subset(train, kept), Subset(train, held_out), where, entry.augment, notes)


def _aligned(where: str, train: ImageDataset, val: ImageDataset) -> ImageDataset:
    """``val`` with its labels in the order of ``train.classes``, which must be its own."""
    present = {val.classes[label] for label in val.labels.unique().tolist()}
    missing = [c for c in train.classes if c not in present]
    if missing:
        raise NotFoundError(
            f"{where}: class {missing[0]!r} is missing from validation"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; "
            "add images of it or remove the class"
        )
    unknown = sorted(present - set(train.classes))
    if unknown:
        raise NotFoundError(f"{where}: class {unknown[0]!r} of the validation split does not occur in training")
    if val.classes == train.classes:
        return val
    return Subset(val, torch.arange(len(val)), [val.classes.index(c) for c in train.classes])


def _check_wnids(entry: Entry, where: str, classes: Sequence[str]) -> None:
    """Classes named by WordNet ids must be those of the data set (names of another kind are left alone)."""
    if entry.wnids is None or not all(re.fullmatch(r"n\d{8}", c) for c in classes):
        return
    unknown = sorted(set(classes) - set(SUBSETS[entry.wnids]))
    if unknown:
        raise NotFoundError(f"{where}: {unknown[0]} is not a class of {entry.name}; is this another ImageNet?")


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices (train, val): ``fraction`` of each class, at least one sample where it has two, is held out.

    Depends on labels, fraction and seed alone: the same on every rank and machine.
    """
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(fraction * len(members))), len(members) - 1)
        val.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values
