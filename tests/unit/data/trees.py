"""Small trees of real images (scikit-learn's digits), laid out as data sets are found on disk."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


@functools.lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target


def digit(label: int, number: int, size: int = 16) -> Image.Image:
    """The ``number``-th image of a digit, RGB."""
    images, targets = _digits()
    members = np.flatnonzero(targets == label % 10)
    return Image.fromarray(images[members[number % len(members)]]).resize((size, size)).convert("RGB")


def write_class(folder: Path, label: int, count: int, suffix: str = ".png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        digit(label, number).save(folder / f"{label}_{number:03d}{suffix}")


def write_tree(
    folder: Path,
    classes: Sequence[str],
    train: int = 6,
    val: int = 3,
    names: tuple[str, str] = ("train", "val"),
) -> Path:
    """``folder/{train,val}/<class>/*.png``; without ``val`` images just ``folder/<class>/*.png``."""
    for label, name in enumerate(classes):
        write_class(folder / names[0] / name if val else folder / name, label, train)
        if val:
            write_class(folder / names[1] / name, label, val, start=train)
    return folder


def png(label: int, number: int) -> bytes:
    buffer = BytesIO()
    digit(label, number).save(buffer, "png")
    return buffer.getvalue()
