"""Image data sets in the one form the rest of the program reads: map-style, labels known without decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nostalgia.errors import NotFoundError

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no image, or not a whole one."""
RANGE_SAMPLES = 2000  # images that a data set's range of values is taken from, at most


class ImageDataset(Protocol):
    """Images by index; ``labels`` index ``classes``."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor  # (N,) int64
    in_memory: bool  # decoded already: `ArrayImages.batch` reads many at once

    def __len__(self) -> int: ...

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        """RGB image (3, H, W), uint8. Raises NotFoundError naming what cannot be read.

        With ``at_least`` a decoder may return a smaller version, its shorter side no less than that.
        """

    def describe(self, index: int) -> str:
        """Where the image comes from, for error lines."""


class ArrayImages:
    """Images that lie in memory: (N, H, W) grey or (N, H, W, 3) uint8."""

    in_memory = True

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> None:
        self.name, self.classes = name, tuple(classes)
        self.images = torch.from_numpy(np.array(images, dtype=np.uint8))  # a copy: arrays may be read-only
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        return self.batch(torch.tensor([index]))[0]

    def batch(self, indices: Tensor) -> Tensor:
        """The images of ``indices`` (B,), as (B, 3, H, W)."""
        images = self.images[indices]
        return images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class FileImages:
    """Images that are decoded from files."""

    in_memory = False

    def __init__(self, name: str, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.name, self.classes = name, tuple(classes)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        # One buffer, not a million strings: worker processes share it, instead of copying it page by page as
        # reference counts change.
        encoded = [os.fsencode(path) for path in paths]
        self._paths = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
        self._ends = torch.tensor([len(path) for path in encoded], dtype=torch.int64).cumsum(0)
        self._white: float | None = None
        self.notes: tuple[str, ...] = ()  # on what lies beside the images and is left out

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        path = self.describe(index)
        return decode(path, path, at_least, self.white)

    def white(self) -> float:
        """The value that is white in this data set's images of 32-bit numbers."""
        if self._white is None:
            self._white = common_white(self.describe, len(self))
        return self._white

    def describe(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index > 0 else 0
        return os.fsdecode(self._paths[start : int(self._ends[index])].numpy().tobytes())


def common_white(file: Callable[[int], str | BytesIO | None], count: int) -> float:
    """The value that is white in images of modes I and F, by the highest among many of ``count``: one rule for all.

    A dark image beside a bright one keeps their ratio.
    """
    step = max(1, count // RANGE_SAMPLES)
    return white_of(max(_highest(file(i)) for i in range(0, count, step)))


def _highest(file: str | BytesIO | None) -> float:
    """The highest value of an image of mode I or F; 0 for any other, and for one that cannot be read."""
    if file is None:
        return 0.0
    try:
        with Image.open(file) as image:
            return float(intensities(image).max(initial=0.0)) if image.mode in ("I", "F") else 0.0
    except UNREADABLE:
        return 0.0  # said when the image itself is read


class Subset:
    """Some samples of a data set, with labels counted anew over the classes kept."""

    def __init__(self, base: ImageDataset, indices: Tensor, classes: Sequence[int] | None = None) -> None:
        self.base, self.indices, self.name, self.in_memory = base, indices, base.name, base.in_memory
        labels = base.labels[indices]
        if classes is None:
            self.classes, self.labels = base.classes, labels
        else:
            self.classes = tuple(base.classes[c] for c in classes)
            lookup = torch.full((len(base.classes),), -1, dtype=torch.int64)
            lookup[torch.tensor(classes)] = torch.arange(len(classes))
            self.labels = lookup[labels]

    def counted_over(self, classes: Sequence[str]) -> Subset:
        """The same samples, labelled by the place of their class in ``classes``, which may hold others besides."""
        result = Subset(self.base, self.indices)
        result.classes = tuple(classes)
        result.labels = torch.tensor([result.classes.index(name) for name in self.classes])[self.labels]
        return result

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        return self.base.image(int(self.indices[index]), at_least)

    def batch(self, indices: Tensor) -> Tensor:
        return self.base.batch(self.indices[indices])  # type: ignore[attr-defined]

    def describe(self, index: int) -> str:
        return self.base.describe(int(self.indices[index]))


class Joined:
    """Data sets of the same classes, one after the other."""

    in_memory = False  # parts may differ in the size of their images

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts, self.name, self.classes = list(parts), parts[0].name, parts[0].classes
        self.labels = torch.cat([part.labels for part in parts])
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        part = self._part(index)
        return self.parts[part].image(index - int(self._starts[part]), at_least)

    def describe(self, index: int) -> str:
        part = self._part(index)
        return self.parts[part].describe(index - int(self._starts[part]))

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


def decode(file: str | BytesIO, where: str, at_least: int | None, top: Callable[[], float] | None = None) -> Tensor:
    """Read an image as (3, H, W) uint8 RGB, upright. Raises NotFoundError, naming ``where``, for a broken one.

    ``top`` gives the value that is white where the file does not say it: see `to_rgb`.
    """
    try:
        with Image.open(file) as image:
            if at_least is not None:
                # JPEG decodes at 1/2, 1/4 or 1/8 for less than the whole cost; other formats ignore this.
                image.draft("RGB", (at_least, at_least))
            pixels = np.array(to_rgb(image, top))  # (H, W, 3); a copy: Pillow's memory is not ours
            return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFoundError(f"{where}: not a readable image ({reason}); replace or remove it") from None


def to_rgb(image: Image.Image, top: Callable[[], float] | None = None) -> Image.Image:
    """Any PIL image as RGB: turned as its EXIF orientation says, 16-bit grey scaled to 8 bits, transparency on white.

    Modes I and F (32-bit whole and real numbers) do not say which value is white: ``top`` does, one rule for the whole
    data set, else the image's own values. Raises ValueError for values that are no intensities.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _scaled(np.asarray(image, dtype=np.float64), 65535.0)
    elif image.mode in ("I", "F"):
        values = intensities(image)
        white = top() if top is not None else white_of(float(values.max(initial=0.0)))
        if float(values.max(initial=0.0)) > white:
            raise ValueError(f"values up to {values.max():g} where the other images of its data set end at {white:g}")
        image = _scaled(values, white)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def intensities(image: Image.Image) -> np.ndarray:
    """The numbers of an image of mode I or F; raises ValueError where some are not finite or below zero."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not numbers (NaN or infinite)")
    if float(values.min(initial=0.0)) < 0:
        raise ValueError(f"pixels below zero ({values.min():g})")
    return values


def white_of(highest: float) -> float:
    """The value that is white in images whose highest value is ``highest``: 1, 255 or 65535; ValueError beyond."""
    for white in (1.0, 255.0, 65535.0):
        if highest <= white:
            return white
    raise ValueError(f"values up to {highest:g}; known are intensities up to 1, 255 and 65535")


def _scaled(values: np.ndarray, white: float) -> Image.Image:
    return Image.fromarray(np.clip(values / white * 255.0, 0, 255).round().astype(np.uint8))
