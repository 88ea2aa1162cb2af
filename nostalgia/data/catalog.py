"""What is known of each data set by name: one entry says it all."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nostalgia.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """A data set by name."""

    name: str
    classes: int | None = None
    torchvision: str | None = None  # a class with (root, train, download) and .data, .targets, .classes
    embedded: bool = False  # comes with the installation
    idx: bool = False  # MNIST's raw idx files, as they are
    augment: str = "crop_flip"
    path: str | None = None  # a folder of the user's, instead of ${dataset.root}/<name>
    how: str = ""  # how to get it


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("digits", classes=10, embedded=True, augment="shift"),
        Entry("mnist", classes=10, torchvision="MNIST", idx=True, augment="shift"),
        Entry("fashion_mnist", classes=10, torchvision="FashionMNIST", idx=True, augment="flip"),
        Entry("cifar10", classes=10, torchvision="CIFAR10"),
        Entry("cifar100", classes=100, torchvision="CIFAR100"),
        Entry("caltech256", classes=256, how="put the class folders under ${dataset.root}/caltech256/{train,val}"),
        Entry("tinyimagenet", classes=200, how="put the class folders under ${dataset.root}/tinyimagenet/{train,val}"),
        Entry("imagenet1k", classes=1000, how="put the class folders under ${dataset.root}/imagenet1k/{train,val}"),
    )
}


def find(name: str, entries: Mapping[str, Any]) -> Entry:
    """The entry of a name: the user's own ``dataset.entries`` first. Raises UsageError with the nearest name."""
    if name in entries:
        base = CATALOG.get(name, Entry(name))
        given = dict(entries[name])
        allowed = ("path", "classes", "augment")
        for key in given:
            if key not in allowed:
                raise UsageError(f"dataset.entries.{name}.{key}: allowed are {', '.join(allowed)}")
        return replace(base, **given)
    if name in CATALOG:
        return CATALOG[name]
    known = [*CATALOG, *entries]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"unknown dataset {name!r}{hint} It is no folder here either; known are {', '.join(sorted(known))}, "
        "a folder of images, or dataset.entries.<name>"
    )
