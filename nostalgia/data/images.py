"""Image data sets in the one form the rest of the program reads: map-style, labels known without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from nostalgia.errors import NotFoundError


class ImageDataset(Protocol):
    """Images by index; ``labels`` index ``classes``."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor  # (N,) int64

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """RGB image (3, H, W), uint8. Raises NotFoundError naming the file that cannot be read."""

    def describe(self, index: int) -> str:
        """Where the image comes from, for error lines."""


class ArrayImages:
    """Images that lie in memory: (N, H, W) grey or (N, H, W, 3) uint8."""

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> None:
        self.name, self.classes = name, tuple(classes)
        self.images = torch.from_numpy(np.array(images))  # a copy: arrays may be read-only
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        image = self.images[index]
        return image.expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class FileImages:
    """Images that are decoded from files."""

    def __init__(self, name: str, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.name, self.paths, self.classes = name, list(paths), tuple(classes)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        try:
            with Image.open(self.paths[index]) as file:
                return tv.pil_to_tensor(to_rgb(file))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NotFoundError(
                f"{self.paths[index]}: not a readable image ({reason}); replace or remove the file"
            ) from None

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class Subset:
    """Some samples of a data set, with labels counted anew over the classes kept."""

    def __init__(self, base: ImageDataset, indices: Tensor, classes: Sequence[int] | None = None) -> None:
        self.base, self.indices, self.name = base, indices, base.name
        labels = base.labels[indices]
        if classes is None:
            self.classes, self.labels = base.classes, labels
        else:
            self.classes = tuple(base.classes[c] for c in classes)
            lookup = torch.full((len(base.classes),), -1, dtype=torch.int64)
            lookup[torch.tensor(classes)] = torch.arange(len(classes))
            self.labels = lookup[labels]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Tensor:
        return self.base.image(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.base.describe(int(self.indices[index]))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: 16-bit grey is scaled to 8 bits, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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
