"""How an image of any size becomes the square that a network is fed: resized, then cropped around its centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

LONGEST = 50  # sides to one: a strip of 1 x 50,000 pixels would be resized to 224 x 11 million


@dataclass(frozen=True)
class Resizing:
    """Resize, then cut out the central square of ``size`` pixels, as image processors of transformers do.

    The shorter side becomes ``edge`` pixels (0: ``size``) and the longer one keeps its ratio to it; under ``stretch`` both
    become ``edge``. Where ``edge`` is less than ``size``, the border is black. Of an image more than 50 times as long as
    wide, the middle is taken first.
    """

    size: int
    edge: int = 0
    stretch: bool = False
    interpolation: str = "bilinear"  # the value of one of torchvision's InterpolationMode

    @property
    def target(self) -> int:
        """What a side, the shorter one at least, is resized to."""
        return self.edge or self.size

    def at(self, size: int) -> Resizing:
        """The same part of an image at another size, to whole pixels."""
        return Resizing(size, round(self.target * size / self.size), self.stretch, self.interpolation)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) uint8 as (..., 3, size, size)."""
        longest = LONGEST * min(images.shape[-2:])
        images = centre(images, *(min(side, longest) for side in images.shape[-2:]))
        return centre(self._resized(images, self.target, self.stretch), self.size, self.size)

    def part(self, image: Tensor, side: float, left: float, top: float) -> Tensor:
        """A part of what a call takes of one image (3, H, W), resized to (3, size, size) from the image's own pixels.

        Its sides are ``side`` times those of the whole; ``left`` and ``top`` in [0, 1] say where it lies.
        """
        height, width = image.shape[-2:]
        short, seen = min(height, width), min(1.0, self.size / self.target)
        whole = [round(seen * length) for length in ((height, width) if self.stretch else (short, short))]
        sides = [max(1, round(length * side)) for length in whole]
        y, x = (
            (length - most) // 2 + round((most - least) * share)
            for length, most, least, share in zip((height, width), whole, sides, (top, left), strict=True)
        )
        return self._resized(image[:, y : y + sides[0], x : x + sides[1]], self.size, stretch=True)

    def _resized(self, images: Tensor, target: int, stretch: bool) -> Tensor:
        sides = [target, target] if stretch else [target]
        if images.shape[-2:] == (target, target):
            return images
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        return tv.resize(images, sides, interpolation=InterpolationMode(self.interpolation), antialias=True)


def centre(images: Tensor, height: int, width: int) -> Tensor:
    """The central (..., height, width) of images, with a black border where they are smaller.

    An odd pixel stays on the right and below, as in transformers; torchvision's own crop rounds to even.
    """
    missing = [
        max(0, wanted - side)
        for wanted, side in zip((width, height), (images.shape[-1], images.shape[-2]), strict=True)
    ]
    if any(missing):
        x, y = missing
        images = F.pad(images, [x // 2, (x + 1) // 2, y // 2, (y + 1) // 2])
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
