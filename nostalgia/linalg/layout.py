"""Which numbers of which parameter each rank holds: plain arithmetic, no communication."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

Interval = tuple[int, int]


class Layout:
    """Vectors over parameters of ``shapes``, cut over ``world_size`` ranks.

    A rank's vector is the concatenation, in parameter order, of one interval (possibly empty) of each
    flattened parameter: ``intervals[rank][i] = (low, high)`` within parameter ``i``.
    """

    def __init__(self, shapes: Sequence[torch.Size], placement: str, world_size: int) -> None:
        self.numels = tuple(shape.numel() for shape in shapes)
        self.offsets = tuple(accumulate(self.numels, initial=0))[:-1]  # of each parameter in the flat vector
        self.size, self.placement = sum(self.numels), placement
        cut = {"local": self._whole, "sliced": self._slice, "sharded": self._shard}[placement]
        self.intervals = tuple(tuple(cut(shapes, rank, world_size)) for rank in range(world_size))
        self.local_sizes = tuple(sum(high - low for low, high in mine) for mine in self.intervals)
        self.widths = tuple(high - low for low, high in self.intervals[0])  # of each parameter: no rank has more of it
        self.padded = sum(self.widths)  # what each rank contributes to a collective of equal parts

    # A buffer of a collective is (world_size, padded). Cut into equal slices it is the flat vector, zeros at its end; of shards
    # each parameter has its columns in it, of its width, with zeros where a rank has less: a copy or two a parameter, not one
    # for each rank as well.

    def spread(self, flats: Sequence[Tensor], buffer: Tensor) -> None:
        """Write whole flat parameters into ``buffer``, zeros so far, each rank's part into its row."""
        if self.placement != "sharded":
            torch.cat(list(flats), out=buffer.view(-1)[: self.size])
            return
        for flat, (column, width) in zip(flats, self._columns(), strict=True):
            full = len(flat) // width if width else 0
            buffer[:full, column : column + width] = flat[: full * width].view(full, width)
            if len(rest := flat[full * width :]):
                buffer[full, column : column + len(rest)] = rest

    def collect(self, buffer: Tensor) -> Tensor:
        """The whole flat vector (P,) of a buffer whose rows are the ranks' parts: a view of it, or a copy."""
        if self.placement != "sharded":
            return buffer.view(-1)[: self.size]
        columns = zip(self._columns(), self.numels, strict=True)
        return torch.cat([buffer[:, c : c + width].reshape(-1)[:numel] for (c, width), numel in columns])

    def widened(self, x: Tensor, rank: int) -> Tensor:
        """A rank's vector (L,) as its row of a buffer (padded,)."""
        if len(x) == self.padded:
            return x
        row, parts = x.new_zeros(self.padded), x.split(self._sizes(rank))
        for part, (column, _) in zip(parts, self._columns(), strict=True):
            row[column : column + len(part)] = part
        return row

    def narrowed(self, row: Tensor, rank: int) -> Tensor:
        """The reverse of `widened`."""
        if self.local_sizes[rank] == self.padded:
            return row
        sizes = zip(self._columns(), self._sizes(rank), strict=True)
        return torch.cat([row[column : column + size] for (column, _), size in sizes])

    def _columns(self) -> Iterator[tuple[int, int]]:
        """First column and width in a buffer of what is cut: the flat vector, or each parameter."""
        if self.placement != "sharded":
            return iter([(0, self.padded)])
        return zip(accumulate(self.widths, initial=0), self.widths, strict=False)

    def _sizes(self, rank: int) -> list[int]:
        """Numbers that ``rank`` has of what is cut."""
        if self.placement != "sharded":
            return [self.local_sizes[rank]]
        return [high - low for low, high in self.intervals[rank]]

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
