"""Images at the network's size: from memory a batch at a time, or from files by worker processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nostalgia.data.images import ImageDataset
from nostalgia.data.resizing import Resizing
from nostalgia.data.transforms import crop_side, random_view, shift
from nostalgia.errors import NotFoundError


@dataclass(frozen=True)
class View:
    """How images reach the network: resizing, normalisation, dtype and device."""

    resizing: Resizing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32

    def scale(self, images: Tensor) -> Tensor:
        """uint8 on any device as numbers in [0, 1] on this one."""
        return images.to(self.device, non_blocking=True).to(self.dtype).div_(255)

    def normalise_(self, images: Tensor) -> Tensor:
        """Numbers in [0, 1] as the network wants them, in place."""
        mean, std = (_channels(values, images.dtype, images.device) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number a channel (3, 1, 1), once on each device: a transfer a batch would make a GPU wait."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


class Prepared:
    """Data sets, one after the other, as (3, S, S) images; ``shifts`` are the domain shifts of each."""

    def __init__(self, datasets: Sequence[ImageDataset], shifts: Sequence[Sequence[str]], resizing: Resizing) -> None:
        self.datasets, self.shifts, self.resizing = list(datasets), [tuple(s) for s in shifts], resizing
        sizes = [len(d) for d in self.datasets]
        self.labels = torch.cat([d.labels for d in self.datasets])  # (N,) within the sample's own data set
        self.tasks = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))  # (N,)
        self.starts = torch.tensor([0, *sizes]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether no file is to be decoded, so that `gather` needs no workers."""
        return all(d.in_memory for d in self.datasets)

    def gather(self, indices: Tensor, device: torch.device) -> Tensor:
        """Images (B, 3, S, S) uint8 on ``device`` of data sets in memory, resized there batch by batch."""
        size = self.resizing.size
        out = torch.empty(len(indices), 3, size, size, dtype=torch.uint8, device=device)
        tasks = self.tasks[indices]
        for task in tasks.unique().tolist():
            rows = tasks == task
            raw = self.datasets[task].batch(indices[rows] - self.starts[task])
            out[rows.to(device)] = self.resizing(raw.to(device))
        return out

    def image(self, index: int, policy: str = "none", draws: Sequence[float] = ()) -> Tensor:
        """One image (3, S, S) uint8, as it is or augmented. Raises NotFoundError naming what cannot be read."""
        task = int(self.tasks[index])
        at_least = None  # as it is: decoded whole, as the network's own image processor does
        if policy != "none":
            side = crop_side(draws) if policy == "crop_flip" else 1.0
            at_least = math.ceil(self.resizing.target / side)
        image = self.datasets[task].image(index - int(self.starts[task]), at_least)
        return random_view(image, self.resizing, policy, draws)

    def read(self, indices: Tensor, device: torch.device, threads: int = 1) -> Tensor:
        """Images (B, 3, S, S) uint8 as they are, from memory or decoded here and now."""
        if self.in_memory:
            return self.gather(indices, device)
        with ThreadPoolExecutor(max(1, threads)) as pool:  # decoding lets go of the interpreter's lock
            return torch.stack(list(pool.map(self.image, indices.tolist()))).to(device)

    def shifted(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Images (B, 3, S, S) of the data sets ``tasks`` (B,) with the domain shifts of each."""
        if len(set(self.shifts)) == 1:
            return shift(images, self.shifts[0])
        for task, names in enumerate(self.shifts):
            rows = tasks == task
            if names and bool(rows.any()):
                images[rows] = shift(images[rows], names)
        return images


class Decoder(Dataset[Tensor | NotFoundError]):
    """What worker processes do: decode, augment and resize the sample of a key (index, draws)."""

    def __init__(self, images: Prepared, policies: Sequence[str]) -> None:
        self.images, self.policies = images, tuple(policies)

    def __getitem__(self, key: tuple[int, Sequence[float]]) -> Tensor | NotFoundError:
        index, draws = key
        try:
            return self.images.image(index, self.policies[int(self.images.tasks[index])], draws)
        except NotFoundError as error:
            return error  # raised again by the main process: one line, not a worker's traceback
