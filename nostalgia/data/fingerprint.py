"""What a split holds, in a few numbers: a run that goes on must find the images it began with."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from nostalgia.data.images import ArrayImages, FileImages, ImageDataset, Joined, Subset

NAMED = 20_000  # images of a split that are kept by name, at most
SHOWN = 3  # names in a message


def fingerprint(images: ImageDataset) -> dict[str, Any]:
    """Plain values: the number of images, a digest of all, and the number and a digest of each class.

    An image is its file's name and size, its contents where it lies in memory, its row in a table. Nothing is decoded.
    """
    names, labels = identities(images), images.labels.tolist()
    classes: dict[str, list[str]] = {name: [] for name in images.classes}
    for name, label in zip(names, labels, strict=True):
        classes[images.classes[label]].append(name)
    by_class = {name: [len(own), _digest(own)] for name, own in classes.items()}
    return {
        "images": len(names),
        "digest": _digest([f"{c} {n} {d}" for c, (n, d) in by_class.items()]),
        "classes": by_class,
    }


def identities(images: ImageDataset) -> list[str]:
    """One string an image, in order."""
    if isinstance(images, Subset):
        base = identities(images.base)
        return [base[i] for i in images.indices.tolist()]
    if isinstance(images, Joined):
        return [name for part in images.parts for name in identities(part)]
    known: list[str] | None = getattr(images, "_identities", None)
    if known is None:
        if isinstance(images, FileImages):
            known = [_file(images.describe(i)) for i in range(len(images))]
        elif isinstance(images, ArrayImages):
            known = [f"{i} {zlib.crc32(images.images[i].numpy().tobytes()):08x}" for i in range(len(images))]
        else:
            known = [f"row {i}" for i in range(len(images))]
        images._identities = known  # type: ignore[attr-defined]
    return known


def names_of(images: ImageDataset) -> list[str] | None:
    """The identities of a split that is not too large to be kept by name, sorted."""
    return sorted(identities(images)) if len(images) <= NAMED else None


def difference(
    then: Mapping[str, Any], now: Mapping[str, Any], before: Sequence[str] | None, after: Sequence[str] | None
) -> str:
    """What has changed in a split, in words; empty where nothing has. ``before`` and ``after``: its images by name."""
    if then["digest"] == now["digest"]:
        return ""
    parts = [f"{now['images']} images where there were {then['images']}"] if now["images"] != then["images"] else []
    if before is not None and after is not None:
        for what, names in (("new", set(after) - set(before)), ("gone", set(before) - set(after))):
            if names:
                shown = ", ".join(name.rsplit(" ", 1)[0] for name in sorted(names)[:SHOWN])
                parts.append(f"{len(names)} {what} ({shown}{', ...' if len(names) > SHOWN else ''})")
    else:
        changed = [c for c in {**then["classes"], **now["classes"]} if then["classes"].get(c) != now["classes"].get(c)]
        parts.append(
            f"{len(changed)} classes changed ({', '.join(changed[:SHOWN])}{', ...' if len(changed) > SHOWN else ''})"
        )
    return "; ".join(parts) or "the same images in another order or under other labels"


def _file(path: str) -> str:
    """``class/name size`` of a file."""
    folder, name = os.path.split(path)
    try:
        size = os.stat(path).st_size
    except OSError:
        size = -1
    return f"{os.path.basename(folder)}/{name} {size}"


def _digest(lines: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
