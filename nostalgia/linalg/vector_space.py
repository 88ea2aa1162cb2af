"""R^P as this rank holds it: the one place that knows how vectors over the parameters are spread over ranks.

Three placements. *local*: the whole vector here, no collectives (one process, or a basis that every rank repeats).
*sliced*: equal slices of the flat vector (DDP, where parameters are whole on each rank). *sharded*: the shards that
FSDP2 gives this rank of each parameter, uneven and empty ones too. The flat order is that of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from nostalgia.errors import UsageError

PLACEMENTS = ("auto", "local", "sliced", "sharded")
# Columns a partial product of float32 vectors is summed over before it is added up in float64.
CHUNK = 1 << 16


@dataclass
class Traffic:
    """Collectives this space has issued on this rank; bytes are what one rank contributes or receives, whichever is more."""

    large: int = 0  # of the size of a vector
    small: int = 0  # a few numbers
    bytes: int = 0

    def snapshot(self) -> Traffic:
        return replace(self)

    def since(self, earlier: Traffic) -> Traffic:
        return Traffic(self.large - earlier.large, self.small - earlier.small, self.bytes - earlier.bytes)


class VectorSpace:
    """Vectors over named parameters; build one with `VectorSpace.of`.

    Vectors are 1-D tensors of ``local_size`` numbers; blocks are (m, local_size). Inner products come back in float64
    and are the same on all ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[torch.Size],
        placement: str,
        *,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names, self.shapes = tuple(names), tuple(torch.Size(shape) for shape in shapes)
        self.placement, self.group = placement, group
        self.dtype, self.device = dtype, torch.device(device)
        collective = placement != "local" and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if collective else 0
        self.world_size = dist.get_world_size(group) if collective else 1
        self.numels = tuple(shape.numel() for shape in self.shapes)
        self.size = sum(self.numels)
        self.traffic = Traffic()
        self._ranges = [self._ranges_of(rank) for rank in range(self.world_size)]
        self.local_size = sum(stop - start for start, stop in self._ranges[self.rank])
        self._padded = max(sum(stop - start for start, stop in ranges) for ranges in self._ranges)

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        *,
        placement: str = "auto",
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> VectorSpace:
        """The space of ``parameters``. ``auto``: sharded where any is a DTensor, sliced in a process group, else local.

        ``dtype`` defaults to the parameters' own, float32 at least. Raises UsageError without parameters, and for
        DTensors that are not sharded along their first dimension on a one-dimensional mesh (what FSDP2 makes).
        """
        if not parameters:
            raise UsageError("no parameters: there is nothing to take the curvature of; check requires_grad")
        if placement not in PLACEMENTS:
            raise UsageError(f"placement={placement!r}: allowed are {', '.join(PLACEMENTS)}")
        tensors = list(parameters.values())
        sharded = [t for t in tensors if isinstance(t, DTensor)]
        if placement == "auto":
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
            placement = "sharded" if sharded else "sliced" if several else "local"
        if placement == "sharded":
            group = _mesh_group(parameters)
        if dtype is None:
            dtype = torch.float32
            for tensor in tensors:
                dtype = torch.promote_types(dtype, tensor.dtype)
        device = device or tensors[0].device
        return cls(list(parameters), [t.shape for t in tensors], placement, group=group, dtype=dtype, device=device)

    def replicated(self) -> VectorSpace:
        """The same vectors held whole on every rank."""
        return VectorSpace(self.names, self.shapes, "local", dtype=self.dtype, device=self.device)

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def zeros(self, *lead: int) -> Tensor:
        return torch.zeros(*lead, self.local_size, dtype=self.dtype, device=self.device)

    def randn(self, seed: int) -> Tensor:
        """Standard normal vector: the same global one for a seed, whatever the placement and number of ranks."""
        return self._random(seed, lambda n, generator: torch.randn(n, generator=generator, dtype=self.dtype))

    def rademacher(self, seed: int) -> Tensor:
        """Vector of independent signs, the same global one for a seed."""
        draw = torch.randint
        return self._random(seed, lambda n, generator: 2.0 * draw(0, 2, (n,), generator=generator).to(self.dtype) - 1)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """<x, y> (0-dim, float64)."""
        return self.gram(x[None], y[None])[0, 0]

    def norm(self, x: Tensor) -> Tensor:
        """|x| (0-dim, float64)."""
        return self.dot(x, x).clamp_min(0.0).sqrt()

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """All inner products (m, n) in float64 of blocks x (m, L) and y (n, L): one small all-reduce."""
        return self.all_reduce(self.local_gram(x, y))

    def local_gram(self, x: Tensor, y: Tensor) -> Tensor:
        """This rank's part of `gram`, not yet summed over ranks."""
        total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=self.device)
        with full_precision_matmul():
            for start in range(0, self.local_size, CHUNK):
                columns = slice(start, start + CHUNK)
                total += x[:, columns] @ y[:, columns].T
        return total

    def combine(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """coefficients (n, m) @ x (m, L) -> (n, L), in the vectors' precision."""
        with full_precision_matmul():
            return coefficients.to(device=x.device, dtype=x.dtype) @ x

    def axpy(self, alpha: float | Tensor, x: Tensor, y: Tensor) -> Tensor:
        """alpha x + y."""
        return alpha * x + y

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """Sum a few numbers over ranks, in place; returns them."""
        if self.world_size > 1:
            dist.all_reduce(numbers, group=self.group)
            self.traffic.small += 1
            self.traffic.bytes += numbers.numel() * numbers.element_size()
        return numbers

    # -- between vectors and parameters ----------------------------------------------------------------------------

    def gather(self, x: Tensor) -> tuple[Tensor, ...]:
        """The whole vector x (L,) as tensors in parameter shape, on every rank: one all-gather of P numbers."""
        flat = self._gather_flat(x)
        return tuple(part.view(shape) for part, shape in zip(flat.split(self.numels), self.shapes, strict=True))

    def scatter(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum whole, parameter-shaped tensors over ranks; returns this rank's part (L,): one reduce-scatter."""
        flat = torch.cat([t.reshape(-1).to(self.dtype) for t in tensors])
        if self.world_size == 1:
            return flat
        send = flat.new_zeros(self.world_size, self._padded)
        for row, ranges in zip(send, self._ranges, strict=True):
            _copy_ranges(flat, ranges, row)
        received = flat.new_empty(self._padded)
        dist.reduce_scatter_tensor(received, send.view(-1), group=self.group)
        self._count_large(send)
        return received[: self.local_size]

    def take(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part (L,), a fresh copy, of tensors that are whole on every rank (or shards): no communication."""
        parts = [_local(t).reshape(-1) for t in tensors]
        if self.placement == "sliced":
            (start, stop), offset, slices = self._ranges[self.rank][0], 0, []
            for part in parts:
                low, high = max(start - offset, 0), min(stop - offset, part.numel())
                if low < high:
                    slices.append(part[low:high])
                offset += part.numel()
            parts = slices
        if not parts:
            return self.zeros()
        return torch.cat([part.to(self.dtype) for part in parts])

    @torch.no_grad()
    def put(self, x: Tensor, tensors: Iterable[Tensor]) -> None:
        """Write the vector x (L,) into ``tensors`` in place: the reverse of `take` (sliced: one all-gather)."""
        flat = self._gather_flat(x) if self.placement == "sliced" else x
        targets = [_local(t) for t in tensors]
        parts = flat.split([t.numel() for t in targets])
        torch._foreach_copy_(targets, [part.view(t.shape) for part, t in zip(parts, targets, strict=True)])

    def gather_flat(self, x: Tensor) -> Tensor:
        """Whole rows (m, P) on every rank of a block x (m, L), one all-gather a row to bound the memory."""
        if self.world_size == 1:
            return x
        rows = [self._gather_flat(row) for row in x]
        return torch.stack(rows) if rows else x.new_zeros(0, self.size)

    def slice_flat(self, x: Tensor) -> Tensor:
        """This rank's part (m, L) of whole rows x (m, P)."""
        if self.world_size == 1:
            return x
        out = x.new_empty(x.shape[0], self.local_size)
        for row, target in zip(x, out, strict=True):
            _copy_ranges(row, self._ranges[self.rank], target)
        return out

    # -- inside ----------------------------------------------------------------------------------------------------

    def _ranges_of(self, rank: int) -> list[tuple[int, int]]:
        """The intervals of the flat vector that ``rank`` holds, in the order in which it holds them."""
        if self.placement == "local" or self.world_size == 1:
            return [(0, self.size)]
        if self.placement == "sliced":
            width = math.ceil(self.size / self.world_size)
            return [(min(rank * width, self.size), min((rank + 1) * width, self.size))]
        ranges, offset = [], 0
        for shape, numel in zip(self.shapes, self.numels, strict=True):
            rows = shape[0] if shape else 1
            width = math.ceil(rows / self.world_size)  # torch.chunk's, which FSDP2 shards by
            low, high = min(rank * width, rows), min((rank + 1) * width, rows)
            stride = numel // rows if rows else 0
            ranges.append((offset + low * stride, offset + high * stride))
            offset += numel
        return ranges

    def _random(self, seed: int, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Draw parameter by parameter, each from its own generator, so that only one is whole at a time."""
        parts, offset = [], 0
        for index, numel in enumerate(self.numels):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
            values = draw(numel, generator)
            for start, stop in self._ranges[self.rank]:
                low, high = max(start - offset, 0), min(stop - offset, numel)
                if low < high:
                    parts.append(values[low:high].to(self.device))
            offset += numel
        return torch.cat(parts) if parts else self.zeros()

    def _gather_flat(self, x: Tensor) -> Tensor:
        """The whole flat vector (P,) of x (L,)."""
        if self.world_size == 1:
            return x
        send = x
        if self.local_size < self._padded:
            send = x.new_zeros(self._padded)
            send[: self.local_size] = x
        received = x.new_empty(self.world_size, self._padded)
        dist.all_gather_into_tensor(received.view(-1), send.contiguous(), group=self.group)
        self._count_large(received)
        if self.placement == "sliced":
            return received.view(-1)[: self.size]
        flat = x.new_empty(self.size)
        for row, ranges in zip(received, self._ranges, strict=True):
            position = 0
            for start, stop in ranges:
                flat[start:stop] = row[position : position + stop - start]
                position += stop - start
        return flat

    def _count_large(self, buffer: Tensor) -> None:
        self.traffic.large += 1
        self.traffic.bytes += buffer.numel() * buffer.element_size()


class full_precision_matmul:
    """Context: float32 matrix products in float32, also where training allows TF32 for its own."""

    def __enter__(self) -> None:
        self._allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._allowed


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _copy_ranges(flat: Tensor, ranges: list[tuple[int, int]], target: Tensor) -> None:
    position = 0
    for start, stop in ranges:
        target[position : position + stop - start] = flat[start:stop]
        position += stop - start


def _mesh_group(parameters: Mapping[str, Tensor]) -> dist.ProcessGroup:
    """The process group of FSDP2's mesh; every parameter in scope must be a first-dimension shard on it."""
    group = None
    for name, tensor in parameters.items():
        if not isinstance(tensor, DTensor):
            raise UsageError(
                f"parameter {name} is not sharded while others are: shard the whole module with fully_shard"
            )
        if tensor.device_mesh.ndim != 1 or tensor.placements != (Shard(0),):
            raise UsageError(
                f"parameter {name} is placed as {tensor.placements} on a {tensor.device_mesh.ndim}-D mesh; "
                "only FSDP2's first-dimension shards on a 1-D mesh are supported"
            )
        group = tensor.device_mesh.get_group()
    assert group is not None
    return group
