"""Batches for one rank, such that all ranks together see every sample of an epoch exactly once.

An epoch is a permutation by (seed, stream, epoch), cut into global steps; a step into micro-batches; a micro-batch into
contiguous shares of the ranks. So one process with batch 64 and two with 32 see the same samples in every step. The
last, short micro-batch is spread over the ranks; a rank without a sample gets one row of weight zero, because every
rank must take part in every forward pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nostalgia.data.images import ImageDataset
from nostalgia.data.transforms import Augmentation, prepare
from nostalgia.errors import NotFoundError, UsageError

CACHE_BYTES = 256 << 20  # data sets whose resized images fit are prepared once and kept


@dataclass
class Batch:
    """One rank's part of a micro-batch, on the device; rows that are not ``valid`` have weight zero."""

    images: Tensor  # (B, 3, H, W) float, normalised
    labels: Tensor  # (B,) int64, within the sample's own task
    valid: Tensor  # (B,) bool
    indices: Tensor  # (B,) int64, in the concatenation of the loader's data sets
    tasks: Tensor  # (B,) int64, which of the loader's data sets

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Step:
    """What one optimizer step is computed from."""

    micro_batches: Iterator[Batch] | list[Batch]
    num_samples: int  # valid ones, over all ranks and micro-batches
    epoch: int
    step: int  # within the epoch, from 1


@dataclass(frozen=True)
class View:
    """How images reach the network: side in pixels, normalisation, dtype and device."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32

    def normalise(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device)[:, None, None]
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device)[:, None, None]
        return (images - mean) / std


class Prepared(Dataset):
    """Resized uint8 images of one or several data sets, one after the other; kept in memory where they are small."""

    def __init__(self, datasets: Sequence[ImageDataset], shifts: Sequence[Sequence[str]], image_size: int) -> None:
        self.datasets, self.shifts, self.image_size = list(datasets), list(shifts), image_size
        self.sizes = [len(d) for d in self.datasets]
        self.labels = torch.cat([d.labels for d in self.datasets])
        self.tasks = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        self.starts = torch.tensor([0, *self.sizes]).cumsum(0)
        self.cache: Tensor | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        return len(self) * 3 * self.image_size**2

    def in_memory(self) -> bool:
        """Whether the images lie in memory to begin with, and are few enough to be kept resized."""
        return self.bytes <= CACHE_BYTES and all(_array_backed(d) for d in self.datasets)

    def fill(self) -> None:
        if self.cache is None:
            self.cache = torch.stack([self._image(i) for i in range(len(self))])

    def __getitem__(self, index: int) -> Tensor | NotFoundError:
        try:
            return self._image(index)
        except NotFoundError as error:
            return error  # raised by the main process, on one line, without a worker's traceback

    def _image(self, index: int) -> Tensor:
        task = int(self.tasks[index])
        image = self.datasets[task].image(index - int(self.starts[task]))
        return prepare(image, self.image_size, self.shifts[task])


class TaskLoader:
    """Epochs of steps for one rank, for training (shuffled, augmented) or evaluation (in order, as they are)."""

    def __init__(
        self,
        images: Prepared,
        view: View,
        *,
        name: str,
        per_device_batch_size: int,
        train: bool,
        accumulation_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        augment: str = "none",
    ) -> None:
        if len(images) == 0:
            raise UsageError(f"{name}: no samples to {'train on' if train else 'evaluate'}")
        self.images, self.view, self.name, self.train, self.seed = images, view, name, train, seed
        self.rank, self.world_size = rank, world_size
        self.micro_batch = per_device_batch_size * world_size
        self.accumulation_steps = accumulation_steps
        self.augmentation = Augmentation(augment if train else "none", seed)
        self._plan: list[list[int]] = []
        self._loader: DataLoader | None = None
        if images.in_memory():
            images.fill()
        else:
            self._loader = DataLoader(
                images,
                batch_sampler=_Plan(self),
                num_workers=num_workers,
                collate_fn=_collate,
                pin_memory=view.device.type == "cuda",
                persistent_workers=num_workers > 0,
            )

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.images) / (self.micro_batch * self.accumulation_steps))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """The steps of an epoch from ``start_step`` (0-based) on; earlier ones are not read."""
        size = self.micro_batch * self.accumulation_steps
        order = self._order(epoch)
        steps = [order[start : start + size] for start in range(start_step * size, len(order), size)]
        shares = [[self._share(micro) for micro in step.split(self.micro_batch)] for step in steps]
        self._plan = [indices.tolist() for step in shares for indices, _ in step]
        fetched = iter(self._loader) if self._loader is not None else None
        for number, (step, parts) in enumerate(zip(steps, shares, strict=True), start_step + 1):
            batches = [self._batch(indices, valid, epoch, fetched) for indices, valid in parts]
            yield Step(batches, len(step), epoch, number)

    def _order(self, epoch: int) -> Tensor:
        if not self.train:
            return torch.arange(len(self.images))
        generator = torch.Generator().manual_seed(stable_seed(self.seed, self.name, epoch))
        return torch.randperm(len(self.images), generator=generator)

    def _share(self, micro: Tensor) -> tuple[Tensor, bool]:
        """This rank's samples of a micro-batch; a stand-in of weight zero where there are none."""
        mine = micro.tensor_split(self.world_size)[self.rank]
        return (mine, True) if len(mine) else (micro[:1], False)

    def _batch(self, indices: Tensor, valid: bool, epoch: int, fetched: Iterator | None) -> Batch:
        device = self.view.device
        if fetched is None:
            assert self.images.cache is not None
            raw = self.images.cache[indices]
        else:
            raw = next(fetched)
            if isinstance(raw, NotFoundError):
                raise raw
        images = raw.to(device, non_blocking=True).to(self.view.dtype) / 255
        samples = indices.to(device)
        images = self.view.normalise(self.augmentation(images, samples, epoch))
        return Batch(
            images=images,
            labels=self.images.labels[indices].to(device),
            valid=torch.full((len(indices),), valid, device=device),
            indices=samples,
            tasks=self.images.tasks[indices].to(device),
        )


class _Plan:
    """Batch sampler over the present epoch's plan, so that worker processes outlive an epoch."""

    def __init__(self, loader: TaskLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._loader._plan)

    def __len__(self) -> int:
        return len(self._loader._plan)


def curvature_batches(
    images: Prepared, view: View, *, name: str, num_samples: int, batch_size: int, seed: int, rank: int, world_size: int
) -> list[Batch]:
    """This rank's share of the fixed curvature set, held on the device: no augmentation, no padding.

    A seeded choice, in proportion to the classes, that does not depend on the number of ranks; shares differ by at most
    one sample and may be empty.
    """
    chosen = stratified_choice(images.labels, num_samples, stable_seed(seed, name, -1))
    mine = chosen.tensor_split(world_size)[rank]
    batches = []
    for indices in mine.split(batch_size) if len(mine) else ():
        raw = [images.cache[i] if images.cache is not None else images._image(int(i)) for i in indices]
        pixels = torch.stack(raw).to(view.device).to(view.dtype) / 255
        batches.append(
            Batch(
                images=view.normalise(pixels),
                labels=images.labels[indices].to(view.device),
                valid=torch.ones(len(indices), dtype=torch.bool, device=view.device),
                indices=indices.to(view.device),
                tasks=images.tasks[indices].to(view.device),
            )
        )
    return batches


def stratified_choice(labels: Tensor, count: int, seed: int) -> Tensor:
    """At most ``count`` indices, each class in proportion (largest remainders), in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if count >= len(labels):
        return order
    # The i-th of n members of a class comes at quantile (i + 1/2) / n: the first `count` are spread over all classes.
    shuffled = labels[order]
    quantile = torch.empty(len(labels), dtype=torch.float64)
    for label in shuffled.unique():
        members = (shuffled == label).nonzero().flatten()
        quantile[members] = (torch.arange(len(members)) + 0.5).double() / len(members)
    return order[quantile.argsort(stable=True)[:count]]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from values, the same on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _array_backed(dataset: object) -> bool:
    base = dataset
    while hasattr(base, "base"):
        base = base.base
    return hasattr(base, "images")


def _collate(items: list[Tensor | NotFoundError]) -> Tensor | NotFoundError:
    error = next((item for item in items if isinstance(item, NotFoundError)), None)
    return error if error is not None else torch.stack([item for item in items if isinstance(item, Tensor)])
