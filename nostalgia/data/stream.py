"""Batches for one rank, such that all ranks together see every sample of an epoch exactly once.

An epoch is a permutation by (seed, stream, epoch), cut into global steps, these into micro-batches, these
into contiguous shares of the ranks. So one process with batch 64 and two with 32 see the same samples in
every step. The last, short micro-batch is spread over the ranks; a rank without a sample gets one row of
weight zero, because every rank must take part in every forward pass. In training one with a single row gets a
second in the same way (unless batches are of one): batch norm cannot normalise a row by itself.

Worker processes draw no random numbers: what decides an augmented view is sent with the index, so no batch
depends on how many they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nostalgia.data.prepared import Decoder, Prepared, View
from nostalgia.data.transforms import Augmentation, uniform
from nostalgia.errors import NotFoundError, RunFailedError, UsageError
from nostalgia.utils.counts import steps_per_epoch

__all__ = ["Batch", "Prepared", "Step", "TaskLoader", "View", "curvature_batches"]


@dataclass
class Batch:
    """One rank's part of a micro-batch, on the device; rows that pad it have weight zero."""

    images: Tensor  # (B, 3, H, W) float, normalised
    labels: Tensor  # (B,) int64, within the sample's own task
    weights: Tensor  # (B,) float: how often a sample counts in the loss
    indices: Tensor  # (B,) int64, in the concatenation of the loader's data sets
    tasks: Tensor  # (B,) int64, which of the model's heads is the sample's
    epoch: int = 0  # counts from 1 in training
    draw: int | None = None  # of a training step: with a sample, what decides which elements are dropped
    head: int | None = None  # that of all samples, where it is known without a look at ``tasks``

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def valid(self) -> Tensor:
        """(B,) bool: rows that are samples, not padding."""
        return self.weights > 0

    def followed_by(self, other: Batch) -> Batch:
        """The rows of this batch, then those of ``other``."""
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(other, name)])
            for name in ("images", "labels", "weights", "indices", "tasks")
        }
        return Batch(**joined, epoch=self.epoch, draw=self.draw)

    def keys(self) -> Tensor | None:
        """(B,) int32, a random number for each sample of a training step, the same on whatever rank it is."""
        if self.draw is None:
            return None
        return (uniform(self.draw, 0, self.indices, 1)[:, 0] * 2**32 - 2**31).to(torch.int32) ^ self.tasks.to(
            torch.int32
        )


@dataclass
class Step:
    """What one optimizer step is computed from."""

    micro_batches: list[Batch]
    num_samples: int  # valid ones, over all ranks and micro-batches
    epoch: int
    step: int  # within the epoch, from 1


class TaskLoader:
    """Epochs of steps for one rank: training (shuffled, augmented) or evaluation (the same order each time, as they are)."""

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
        augment: str | Sequence[str] = "none",
        heads: Sequence[int] | None = None,
        stratified: bool = False,
    ) -> None:
        """``augment``: one policy, or one for each data set of ``images``; ``heads``: the place of each data set's head
        among those of the model, by default its own number; ``stratified``: evaluation in a seeded order, of which every
        beginning holds the classes in proportion."""
        if len(images) == 0:
            raise UsageError(f"{name}: no samples to {'train on' if train else 'evaluate'}")
        self.images, self.view, self.name, self.train, self.seed = images, view, name, train, seed
        self.rank, self.world_size = rank, world_size
        self.micro_batch = per_device_batch_size * world_size
        self._least = min(2, per_device_batch_size) if train else 1  # rows of a batch
        self._heads = None if heads is None else torch.tensor(list(heads))
        self._unshuffled = torch.arange(len(images))
        if stratified:
            self._unshuffled = stratified_choice(_classes_of(images), len(images), stable_seed(seed, name))
        self.accumulation_steps = accumulation_steps
        policies = [augment] * len(images.datasets) if isinstance(augment, str) else list(augment)
        if not train:
            policies = ["none"] * len(images.datasets)
        self.augmentation = Augmentation(policies, stable_seed(seed, name))
        self._plan = _Plan(self.augmentation)
        self._loader = None if images.in_memory else self._workers(num_workers)

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.images), self.micro_batch * self.accumulation_steps)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """The steps of an epoch from ``start_step`` (0-based) on; earlier ones are not read."""
        size = self.micro_batch * self.accumulation_steps
        order = self._order(epoch)
        steps = [order[start : start + size] for start in range(start_step * size, len(order), size)]
        shares = [[self._share(micro, order) for micro in step.split(self.micro_batch)] for step in steps]
        self._plan.batches, self._plan.epoch = [indices for step in shares for indices, _ in step], epoch
        fetched = None if self._loader is None else iter(self._loader)
        for number, (step, parts) in enumerate(zip(steps, shares, strict=True), start_step + 1):
            batches = [self._batch(indices, count, epoch, fetched) for indices, count in parts]
            if self.train:
                draw = stable_seed(self.seed, self.name, "dropout", epoch, number)
                batches = [replace(batch, draw=draw) for batch in batches]
            yield Step(batches, len(step), epoch, number)

    def _order(self, epoch: int) -> Tensor:
        if not self.train:
            return self._unshuffled
        generator = torch.Generator().manual_seed(stable_seed(self.seed, self.name, epoch))
        return torch.randperm(len(self.images), generator=generator)

    def _share(self, micro: Tensor, order: Tensor) -> tuple[Tensor, int]:
        """This rank's samples of a micro-batch and their number; behind them stand-ins of weight zero, where needed."""
        mine = micro.tensor_split(self.world_size)[self.rank]
        missing = self._least - len(mine)
        if missing <= 0:
            return mine, len(mine)
        others = order[~torch.isin(order, mine)] if len(order) > 1 else order
        return torch.cat([mine, others[:missing]]), len(mine)

    def _batch(self, indices: Tensor, count: int, epoch: int, fetched: Iterator[Any] | None) -> Batch:
        raw = self.images.gather(indices, self.view.device) if fetched is None else _next(fetched)
        batch = _as_batch(self.images, self.view, indices, self.view.scale(raw), count)
        batch.epoch = epoch
        if fetched is None:
            batch.images = self.augmentation.batch(batch.images, batch.indices, batch.tasks, epoch)
        batch.images = self.view.normalise_(self.images.shifted(batch.images, batch.tasks))
        if self._heads is not None:
            self._heads = self._heads.to(batch.tasks.device)
            batch.tasks = self._heads[batch.tasks]
        return batch

    def _workers(self, num_workers: int) -> DataLoader[Any]:
        # Those of training live as long as the loader. Those of evaluation go after each pass: a run keeps a
        # loader for every task it has seen, and their idle processes would add up.
        return DataLoader(
            Decoder(self.images, self.augmentation.policies),
            batch_sampler=self._plan,
            num_workers=num_workers,
            collate_fn=_collate,
            # Its own: a loader draws a seed from the process's generator as often as it starts workers, and
            # dropout would then depend on how many they are.
            generator=torch.Generator(),
            pin_memory=self.view.device.type == "cuda",
            persistent_workers=self.train and num_workers > 0,
            prefetch_factor=4 if num_workers > 0 else None,
        )


class _Plan:
    """Batch sampler over the present epoch's batches, so that worker processes outlive an epoch."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation, self.epoch = augmentation, 0
        self.batches: list[Tensor] = []

    def __iter__(self) -> Iterator[list[tuple[int, list[float]]]]:
        for indices in self.batches:
            draws = self.augmentation.draws(indices, self.epoch)
            yield list(zip(indices.tolist(), draws.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.batches)


def curvature_batches(
    images: Prepared,
    view: View,
    *,
    name: str,
    num_samples: int,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    num_workers: int = 0,
) -> list[Batch]:
    """This rank's share of the fixed curvature set, held on the device: no augmentation, no padding.

    A seeded choice, in proportion to the classes of each data set, that does not depend on the number of ranks; shares
    differ by at most one sample and may be empty. A batch is of one data set, so that its samples have one head.
    ``num_workers`` threads decode, or this one.
    """
    chosen = stratified_choice(_classes_of(images), num_samples, stable_seed(seed, name, -1))
    chosen = chosen[images.tasks[chosen].argsort(stable=True)]
    mine = chosen.tensor_split(world_size)[rank]
    batches = []
    counts = torch.bincount(images.tasks[mine]).tolist()
    for indices in (piece for own in mine.split(counts) for piece in own.split(batch_size) if len(piece)):
        pixels = view.scale(images.read(indices, view.device, num_workers))
        batch = _as_batch(images, view, indices, pixels, len(indices))
        batch.images = view.normalise_(images.shifted(batch.images, batch.tasks))
        batches.append(batch)
    return batches


def _classes_of(images: Prepared) -> Tensor:
    """(N,) a number for each class of each data set."""
    return images.tasks * (int(images.labels.max()) + 1) + images.labels


def stratified_choice(labels: Tensor, count: int, seed: int) -> Tensor:
    """At most ``count`` indices, each class in proportion to its size, and so in every beginning of them; otherwise random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # The i-th of n members of a class stands at quantile (i + 1/2) / n: the first `count` spread over all.
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


def _as_batch(images: Prepared, view: View, indices: Tensor, pixels: Tensor, count: int) -> Batch:
    """The first ``count`` rows are valid."""
    numbers = torch.stack([images.labels[indices], indices, images.tasks[indices]])
    if view.device.type == "cuda":
        numbers = numbers.pin_memory()
    labels, own, tasks = numbers.to(view.device, non_blocking=True)  # one transfer, which nobody waits for
    return Batch(
        images=pixels,
        labels=labels,
        weights=(torch.arange(len(indices), device=view.device) < count).to(view.dtype),
        indices=own,
        tasks=tasks,
    )


def _next(fetched: Iterator[Any]) -> Tensor:
    try:
        batch = next(fetched)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunFailedError(
            f"a loader process died ({str(error).splitlines()[0]}): out of memory or of shared memory "
            "(/dev/shm)? Try fewer dataset.num_workers, or 0"
        ) from None
    if isinstance(batch, NotFoundError):
        raise batch
    return batch


def _collate(items: list[Tensor | NotFoundError]) -> Tensor | NotFoundError:
    error = next((item for item in items if isinstance(item, NotFoundError)), None)
    return error if error is not None else torch.stack([item for item in items if isinstance(item, Tensor)])
