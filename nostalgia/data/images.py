"""Image data sets in the one form the rest of the program reads: map-style, labels known without decoding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from nostalgia.errors import NotFoundError

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no image, or not a whole one."""


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

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        path = self.describe(index)
        return decode(path, path, at_least)

    def describe(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index > 0 else 0
        return os.fsdecode(self._paths[start : int(self._ends[index])].numpy().tobytes())


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


def decode(file: str | BytesIO, where: str, at_least: int | None) -> Tensor:
    """Read an image as (3, H, W) uint8 RGB. Raises NotFoundError, naming ``where``, for a broken one."""
    try:
        with Image.open(file) as image:
            if at_least is not None:
                # JPEG decodes at 1/2, 1/4 or 1/8 for less than the whole cost; other formats ignore this.
                image.draft("RGB", (at_least, at_least))
            return tv.pil_to_tensor(to_rgb(image))
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFoundError(f"{where}: not a readable image ({reason}); replace or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: 16-bit grey is scaled to 8 bits, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # Modes I and F do not say their range: 8-bit values in them stay, others are 16-bit. I;16 always is.
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
