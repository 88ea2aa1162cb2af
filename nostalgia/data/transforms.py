"""Image transforms: augmentation, and the domain shifts that belong to a task.

Augmentation draws its numbers from a hash of (seed, epoch, sample), so a sample looks the same whatever rank,
worker or batch it falls into. Decoded files are augmented as they are resized, by the worker that decodes them
(a crop costs no more than the resizing it replaces); images in memory on the device, a batch at a time.
Domain shifts come after it, on the device, for training, validation and curvature alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nostalgia.data.catalog import AUGMENTATIONS
from nostalgia.data.resizing import Resizing
from nostalgia.errors import UsageError
from nostalgia.options import nearest

Shift = Callable[[Tensor], Tensor]


def _torchvision(name: str, **options: Any) -> Shift:
    """A function of torchvision's, imported with its first call: a second of every command's start otherwise."""

    def call(images: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        result: Tensor = getattr(tv, name)(images, **options)
        return result

    return call


SHIFTS: dict[str, Shift] = {
    "invert": _torchvision("invert"),
    "grayscale": _torchvision("rgb_to_grayscale", num_output_channels=3),
    "blur": _torchvision("gaussian_blur", kernel_size=[5, 5]),
    "rotate90": lambda images: images.rot90(1, (-2, -1)),
    "rotate180": lambda images: images.rot90(2, (-2, -1)),
    "rotate270": lambda images: images.rot90(3, (-2, -1)),
    "flip_horizontal": lambda images: images.flip(-1),
    "flip_vertical": lambda images: images.flip(-2),
}
_PERMUTE = re.compile(r"permute(\d{0,9})", re.ASCII)  # permute, permute1, permute2, ...: each its own


def check_shifts(names: Sequence[str]) -> None:
    """Raise UsageError for an unknown transform of a task."""
    for name in names:
        if not isinstance(name, str) or not (name in SHIFTS or _PERMUTE.fullmatch(name)):
            known = [*SHIFTS, "permute"]
            allowed = f"allowed are {', '.join(known)}, permute1, permute2, ..."
            raise UsageError(f"unknown transform {name!r}{nearest(str(name), known)}; {allowed}")


def shift(images: Tensor, names: Sequence[str]) -> Tensor:
    """Domain shifts of images (B, 3, S, S), floats in [0, 1] or uint8, in their order."""
    for name in names:
        images = SHIFTS[name](images) if name in SHIFTS else _permute(images, name)
    return images


def _permute(images: Tensor, name: str) -> Tensor:
    """One fixed permutation of the pixels, the same for all images."""
    match = _PERMUTE.fullmatch(name)
    assert match is not None
    pixels = images.shape[-2] * images.shape[-1]
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(int(match[1] or 0)))
    return images.flatten(-2)[..., order.to(images.device)].view(images.shape)


class Augmentation:
    """Random views of images, by a policy for each data set."""

    def __init__(self, policies: Sequence[str], seed: int) -> None:
        for policy in policies:
            if policy not in AUGMENTATIONS:
                raise UsageError(f"dataset.augment={policy!r}: allowed are default, {', '.join(AUGMENTATIONS)}")
        self.policies, self.seed = tuple(policies), seed

    def draws(self, samples: Tensor, epoch: int) -> Tensor:
        """The numbers in [0, 1) that decide the views of ``samples`` (B,), as (B, 4) float64."""
        return uniform(self.seed, epoch, samples, 4)

    def batch(self, images: Tensor, samples: Tensor, tasks: Tensor, epoch: int) -> Tensor:
        """Views of images (B, 3, S, S), floats in [0, 1], of the data sets ``tasks`` (B,).

        ``images`` may be overwritten: new memory is what this costs on a CPU.
        """
        draws = self.draws(samples, epoch)
        if len(set(self.policies)) == 1:
            return random_views(images, self.policies[0], draws)
        for task, policy in enumerate(self.policies):
            rows = tasks == task
            images[rows] = random_views(images[rows], policy, draws[rows])
        return images


def random_views(images: Tensor, policy: str, draws: Tensor) -> Tensor:
    """Views of a batch (B, 3, S, S) of floats that ``draws`` (B, 4) decide; may overwrite ``images``."""
    if policy == "none" or len(images) == 0:
        return images
    mirror = torch.where(draws[:, 3] < 0.5, -1.0, 1.0)
    if policy == "flip":
        rows = mirror < 0
        images[rows] = images[rows].flip(-1)
        return images
    if policy == "shift":
        pixels = torch.round((draws[:, :2] - 0.5) * (images.shape[-1] / 4))  # up to an eighth of the side
        return _view(images, torch.ones_like(draws[:, :2]), 2 * pixels / images.shape[-1])
    side = (0.6 + 0.4 * draws[:, 0]).sqrt()  # of the view, whose area is 60 to 100 %
    centre = (draws[:, 1:3] * 2 - 1) * (1 - side)[:, None]
    return _view(images, torch.stack([side * mirror, side], 1), centre)


def random_view(image: Tensor, resizing: Resizing, policy: str, draws: Sequence[float]) -> Tensor:
    """The same view of one decoded image (3, H, W) uint8, taken at its own resolution, as (3, size, size)."""
    if policy == "shift":
        size = resizing.size
        offsets = [round((draw - 0.5) * (size / 4)) for draw in draws[:2]]
        columns, rows = ((torch.arange(size) + offset).clamp_(0, size - 1) for offset in offsets)
        return resizing(image)[:, rows][:, :, columns]
    view = resizing.part(image, crop_side(draws), *draws[1:3]) if policy == "crop_flip" else resizing(image)
    return view.flip(-1) if policy != "none" and draws[3] < 0.5 else view


def crop_side(draws: Sequence[float]) -> float:
    """The side of crop_flip's view, relative to the image's."""
    return (0.6 + 0.4 * draws[0]) ** 0.5


def _view(images: Tensor, sides: Tensor, centres: Tensor) -> Tensor:
    """Views of relative ``sides`` (B, 2) around ``centres`` (B, 2) in [-1, 1], both (x, y); the border is repeated.

    A negative side mirrors.
    """
    count, _, height, width = images.shape
    sides, centres = sides.to(images.dtype), centres.to(images.dtype)
    grid = images.new_empty(count, height, width, 2)
    for axis, size in enumerate((width, height)):
        line = (torch.arange(size, device=images.device, dtype=images.dtype) * 2 + 1) / size - 1  # pixel centres
        at = sides[:, axis, None] * line + centres[:, axis, None]  # (B, size)
        grid[..., axis] = at[:, None, :] if axis == 0 else at[:, :, None]
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


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
