"""Batches of stored exemplars of earlier tasks, for methods that replay; the same whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from nostalgia.data.prepared import Prepared, View
from nostalgia.data.stream import Batch, stable_seed
from nostalgia.data.transforms import Augmentation, uniform
from nostalgia.errors import UsageError

Exemplar = tuple[int, int]  # task (from 1), and index within its training images


class ExemplarLoader:
    """Training batches, augmented as the exemplars' own tasks are, of a fixed list of exemplars.

    ``images`` holds the training images of tasks 1, 2, ... in order, ``heads`` the place of each task's head among
    those of the model. Which exemplars are drawn is a function of ``seed`` and of what the caller asks for, not of
    ranks, batch sizes or earlier draws: there is no state to restore.
    """

    def __init__(
        self,
        exemplars: Sequence[Exemplar],
        images: Prepared,
        view: View,
        *,
        augment: Sequence[str],
        heads: Sequence[int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
    ) -> None:
        for task, index in exemplars:
            if not 1 <= task <= len(images.datasets) or not 0 <= index < len(images.datasets[task - 1]):
                raise UsageError(f"exemplar ({task}, {index}): tasks 1 to {len(images.datasets)} have no such image")
        self.images, self.view, self.seed = images, view, stable_seed(seed, "exemplars")
        self.rank, self.world_size, self.threads = rank, world_size, threads
        self.augmentation = Augmentation(list(augment), self.seed)
        self.heads = torch.tensor(list(heads))
        self.indices = torch.tensor([int(images.starts[task - 1]) + index for task, index in exemplars]).long()  # (M,)

    def __len__(self) -> int:
        return len(self.indices)

    def paired(self, batch: Batch) -> Batch:
        """One exemplar for each row of ``batch``, drawn by the row's sample and epoch; weights are the rows' own."""
        draws = uniform(self.seed, batch.epoch, batch.indices, 1)[:, 0]
        positions = (draws * len(self)).long().cpu()
        return self.take(positions, batch.weights, batch.epoch)

    def drawn(self, count: int, key: int) -> Batch:
        """This rank's share of ``count`` exemplars (at most all of them), drawn without replacement by ``key``.

        A rank with fewer than two, which batch norm cannot normalise by themselves, gets stand-ins of weight zero.
        """
        generator = torch.Generator().manual_seed(stable_seed(self.seed, key))
        order = torch.randperm(len(self), generator=generator)
        mine = order[:count].tensor_split(self.world_size)[self.rank]
        others = order[~torch.isin(order, mine)] if len(order) > 1 else order
        weights = torch.zeros(max(2, len(mine)), dtype=self.view.dtype, device=self.view.device)
        weights[: len(mine)] = 1
        mine = torch.cat([mine, others[: max(0, 2 - len(mine))]])
        weights = weights[: len(mine)]
        return replace(self.take(mine, weights, key), draw=stable_seed(self.seed, "dropout", key))

    def take(self, positions: Tensor, weights: Tensor, epoch: int = 0) -> Batch:
        """The exemplars at ``positions`` (B,) of the list, in views that ``epoch`` decides; 0: as they are."""
        indices = self.indices[positions.cpu()]
        tasks = self.images.tasks[indices].to(self.view.device)
        pixels = self.view.scale(self._read(indices, epoch))
        if epoch and self.images.in_memory:
            pixels = self.augmentation.batch(pixels, indices.to(self.view.device), tasks, epoch)
        return Batch(
            images=self.view.normalise_(self.images.shifted(pixels, tasks)),
            labels=self.images.labels[indices].to(self.view.device),
            weights=weights,
            indices=indices.to(self.view.device),
            tasks=self.heads.to(self.view.device)[tasks],
            epoch=epoch,
        )

    def _read(self, indices: Tensor, epoch: int) -> Tensor:
        if self.images.in_memory or not epoch:
            return self.images.read(indices, self.view.device, self.threads)
        draws = self.augmentation.draws(indices, epoch).tolist()
        policies = [self.augmentation.policies[task] for task in self.images.tasks[indices].tolist()]
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            views = list(pool.map(self.images.image, indices.tolist(), policies, draws))
        return torch.stack(views).to(self.view.device)
