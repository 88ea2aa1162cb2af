"""Image transforms: domain shifts that belong to a task, resizing, and augmentation on the device.

Augmentation draws its numbers from a hash of (seed, epoch, sample), so a sample looks the same whatever rank, worker or
batch it falls into. Domain shifts apply to training, validation and curvature alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from nostalgia.errors import UsageError

Shift = Callable[[Tensor], Tensor]


def _permute(image: Tensor) -> Tensor:
    """One fixed permutation of the pixels, the same for all images of a size."""
    pixels = image.shape[-2] * image.shape[-1]
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(pixels))
    return image.flatten(-2)[..., order].view_as(image)


SHIFTS: dict[str, Shift] = {
    "invert": tv.invert,
    "grayscale": lambda image: tv.rgb_to_grayscale(image, num_output_channels=3),
    "blur": lambda image: tv.gaussian_blur(image, kernel_size=[5, 5]),
    "rotate90": lambda image: image.rot90(1, (-2, -1)),
    "rotate180": lambda image: image.rot90(2, (-2, -1)),
    "rotate270": lambda image: image.rot90(3, (-2, -1)),
    "flip_horizontal": lambda image: image.flip(-1),
    "flip_vertical": lambda image: image.flip(-2),
    "permute": _permute,
}


def check_shifts(names: Sequence[str]) -> None:
    """Raise UsageError for an unknown transform of a task."""
    for name in names:
        if name not in SHIFTS:
            close = difflib.get_close_matches(str(name), SHIFTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown transform {name!r}{hint} Allowed are {', '.join(SHIFTS)}")


def prepare(image: Tensor, size: int, shifts: Sequence[str]) -> Tensor:
    """A decoded image (3, H, W) uint8, shifted and resized to (3, size, size): the short side fitted, the centre cut."""
    for name in shifts:
        image = SHIFTS[name](image)
    if image.shape[-2:] != (size, size):
        image = tv.center_crop(tv.resize(image, [size], antialias=True), [size, size])
    return image


class Augmentation:
    """Random views of a batch (B, 3, H, W) of floats in [0, 1], by policy: none, flip, crop_flip or shift."""

    POLICIES = ("none", "flip", "crop_flip", "shift")

    def __init__(self, policy: str, seed: int) -> None:
        if policy not in self.POLICIES:
            raise UsageError(f"dataset.augment={policy!r}: allowed are default, {', '.join(self.POLICIES)}")
        self.policy, self.seed = policy, seed

    def __call__(self, images: Tensor, samples: Tensor, epoch: int) -> Tensor:
        """``samples`` (B,) int64 identify the images; row i depends on (seed, epoch, samples[i]) alone."""
        if self.policy == "none":
            return images
        draws = uniform(self.seed, epoch, samples, 4).to(images.dtype)  # (B, 4)
        if self.policy == "shift":
            pixels = torch.round((draws[:, :2] - 0.5) * images.shape[-1] / 4)
            return _sample(images, torch.ones_like(draws[:, 0]), 2 * pixels / images.shape[-1])
        flipped = torch.where((draws[:, 3] < 0.5)[:, None, None, None], images.flip(-1), images)
        if self.policy == "flip":
            return flipped
        side = (0.6 + 0.4 * draws[:, 0]).sqrt()  # of the view, whose area is 60 to 100 %
        centre = (draws[:, 1:3] * 2 - 1) * (1 - side)[:, None]
        return _sample(flipped, side, centre)


def _sample(images: Tensor, side: Tensor, centre: Tensor) -> Tensor:
    """Square views of relative ``side`` (B,) around ``centre`` (B, 2) in [-1, 1], bilinear, edges black."""
    zero = torch.zeros_like(side)
    rows = [torch.stack([side, zero, centre[:, 0]], 1), torch.stack([zero, side, centre[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def uniform(seed: int, epoch: int, samples: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, draws) float64: a splitmix64 hash of (seed, epoch, sample, draw)."""
    columns = torch.arange(draws, device=samples.device, dtype=torch.int64)
    state = _mix(_mix(_mix(samples + _mix_int(seed)) + epoch)[:, None] + columns)
    return (state >> 11 & ((1 << 53) - 1)).double() / float(1 << 53)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) in wrapping int64; the masks make its shifts logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & ((1 << 33) - 1))


def _mix_int(value: int) -> int:
    return int(_mix(torch.tensor([value], dtype=torch.int64)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
