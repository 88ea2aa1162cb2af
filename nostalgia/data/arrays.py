"""Data sets that are read whole into memory: scikit-learn's digits, and MNIST's idx files."""

from __future__ import annotations

import gzip
import math
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

from nostalgia.data.catalog import Entry
from nostalgia.data.images import ArrayImages
from nostalgia.data.source import Source, make_source
from nostalgia.errors import NotFoundError

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip


def digits(entry: Entry, val_fraction: float) -> Source:
    """1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn."""
    # What load_digits() reads, from where it reads it: importing scikit-learn takes longer than a small task's training.
    package = Path(distribution("scikit-learn").locate_file("sklearn"))  # type: ignore[arg-type]
    rows = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # 64 pixels of 0 to 16, the digit
    images = np.round(rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    whole = ArrayImages(entry.name, images, rows[:, 64].astype(int).tolist(), [str(c) for c in range(10)])
    return make_source(entry, "embedded", "scikit-learn", whole, None, val_fraction)


def has_idx(folder: Path) -> bool:
    """Whether MNIST's training images lie in the folder, plain or gzipped."""
    return any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz"))


def idx(entry: Entry, folder: Path, val_fraction: float, kind: str = "folder") -> Source:
    """A folder of MNIST's four files, plain or gzipped: train-* and t10k-*, images and labels."""
    splits = []
    for prefix in ("train", "t10k"):
        images = _read(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise NotFoundError(
                f"{folder}: {len(images)} {prefix} images but {len(labels)} labels; copy the files again"
            )
        highest = int(labels.max(initial=0))
        count = entry.classes or highest + 1
        if highest >= count:
            raise NotFoundError(
                f"{folder}: label {highest} in {prefix}-labels is out of range; {entry.name} has {count} classes, "
                f"0 to {count - 1}"
            )
        names = GARMENTS if entry.name == "fashion_mnist" else [str(c) for c in range(count)]
        splits.append(ArrayImages(entry.name, images, labels.tolist(), names))
    return make_source(entry, kind, str(folder), splits[0], splits[1], val_fraction)


def _read(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An unsigned-byte idx file, plain or gzipped (yann.lecun.com/exdb/mnist)."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise NotFoundError(f"{folder}: {name} (or {name}.gz) is missing beside the others")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise NotFoundError(f"{path}: broken or partial ({error}); copy it again") from None
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4)]
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != header + math.prod(shape):
        raise NotFoundError(f"{path}: broken or partial (not an idx file of {dimensions} dimensions); copy it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
