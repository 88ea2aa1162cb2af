"""Which numbers of which parameter each rank holds: plain arithmetic, no communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

Interval = tuple[int, int]


class Layout:
    """Vectors over parameters of ``shapes``, cut over ``world_size`` ranks.

    A rank's vector is the concatenation, in parameter order, of one interval (possibly empty) of each
    flattened parameter: ``intervals[rank][i] = (low, high)`` within parameter ``i``.
    """

    def __init__(self, shapes: Sequence[torch.Size], placement: str, world_size: int) -> None:
        self.numels = tuple(shape.numel() for shape in shapes)
        self.offsets = tuple(accumulate(self.numels, initial=0))[:-1]  # of each parameter in the flat vector
        self.size = sum(self.numels)
        cut = {"local": self._whole, "sliced": self._slice, "sharded": self._shard}[placement]
        self.intervals = tuple(tuple(cut(shapes, rank, world_size)) for rank in range(world_size))
        self.local_sizes = tuple(sum(high - low for low, high in mine) for mine in self.intervals)
        self.padded = max(self.local_sizes)  # what each rank contributes to a collective of equal parts

    def flat_ranges(self, rank: int) -> list[Interval]:
        """The non-empty intervals of ``rank`` in the flat vector (P,), neighbours joined."""
        ranges: list[Interval] = []
        for offset, (low, high) in zip(self.offsets, self.intervals[rank], strict=True):
            if low == high:
                continue
            if ranges and ranges[-1][1] == offset + low:
                ranges[-1] = (ranges[-1][0], offset + high)
            else:
                ranges.append((offset + low, offset + high))
        return ranges

    def _whole(self, shapes: Sequence[torch.Size], rank: int, world_size: int) -> list[Interval]:
        return [(0, numel) for numel in self.numels]

    def _slice(self, shapes: Sequence[torch.Size], rank: int, world_size: int) -> list[Interval]:
        """Equal slices of the flat vector; the last ranks' may be short or empty."""
        width = math.ceil(self.size / world_size)
        start, stop = rank * width, (rank + 1) * width
        return [
            (min(max(start - offset, 0), numel), min(max(stop - offset, 0), numel))
            for offset, numel in zip(self.offsets, self.numels, strict=True)
        ]

    def _shard(self, shapes: Sequence[torch.Size], rank: int, world_size: int) -> list[Interval]:
        """FSDP2's shards: each parameter's rows cut as `torch.chunk` cuts them."""
        intervals = []
        for shape, numel in zip(shapes, self.numels, strict=True):
            rows = shape[0] if shape else 1
            width, stride = math.ceil(rows / world_size), numel // rows if rows else 0
            intervals.append((min(rank * width, rows) * stride, min((rank + 1) * width, rows) * stride))
        return intervals
