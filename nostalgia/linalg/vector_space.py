"""R^P as this rank holds it: the one place that knows how vectors over parameters are spread over ranks.

Three placements. *local*: the whole vector here, no collectives (one process, or a basis every rank
repeats). *sliced*: equal slices of the flat vector (DDP, where parameters are whole on each rank).
*sharded*: the shards that FSDP2 gives this rank of each parameter, uneven and empty ones too. The flat order
is that of the parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nostalgia.errors import UsageError
from nostalgia.linalg.layout import Layout
from nostalgia.linalg.precision import full_precision_matmul

PLACEMENTS = ("auto", "local", "sliced", "sharded")
# Columns of a block handled at once: bounds temporaries, and the length float32 products are summed over
# before they are added up in float64. On a CPU the piece stays in the cache; a GPU wants fewer, larger calls.
CHUNK = {"cpu": 1 << 14, "cuda": 1 << 17}
# Newer versions of torch call the same collectives by other names, and warn of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Collectives issued by this rank; bytes count each one's larger buffer (what goes in or comes out)."""

    large: int = 0  # of the size of a vector
    small: int = 0  # a few numbers
    bytes: int = 0

    def snapshot(self) -> Traffic:
        return replace(self)

    def since(self, earlier: Traffic) -> Traffic:
        return Traffic(self.large - earlier.large, self.small - earlier.small, self.bytes - earlier.bytes)


class VectorSpace:
    """Vectors over named parameters; build one with `VectorSpace.of`.

    Vectors are 1-D tensors of ``local_size`` numbers; blocks are (m, local_size). Inner products come back in
    float64 on ``device`` and are the same on all ranks.

    Examples:
        >>> import torch
        >>> parameters = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
        >>> space = VectorSpace.of(parameters)
        >>> x = space.take(parameters.values())
        >>> space.size, float(space.dot(x, x))
        (6, 4.0)
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
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"dtype={dtype}: vectors are torch.float32 or torch.float64")
        self.names, self.shapes = tuple(names), tuple(torch.Size(shape) for shape in shapes)
        self.placement, self.group = placement, group
        self.dtype, self.device = dtype, torch.device(device)
        collective = placement != "local" and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if collective else 0
        self.world_size = dist.get_world_size(group) if collective else 1
        self.layout = _layout(self.shapes, placement, self.world_size)
        self.size = self.layout.size
        self.local_size = self.layout.local_sizes[self.rank]
        self.traffic = Traffic()

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
        """The space of ``parameters``.

        ``auto``: sharded where any is a DTensor, sliced in a process group of several, else local. ``dtype``
        defaults to the parameters' own, float32 at least. Raises UsageError without parameters, and for
        DTensors not sharded along their first dimension on a one-dimensional mesh (what FSDP2 makes).
        """
        if not parameters:
            raise UsageError("no parameters: there is nothing to take the curvature of; check requires_grad")
        if placement not in PLACEMENTS:
            raise UsageError(f"placement={placement!r}: allowed are {', '.join(PLACEMENTS)}")
        tensors = list(parameters.values())
        if placement == "auto":
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
            any_sharded = any(isinstance(tensor, DTensor) for tensor in tensors)
            placement = "sharded" if any_sharded else "sliced" if several else "local"
        if placement == "sharded":
            group = _mesh_group(parameters)
        if dtype is None:
            dtype = torch.float32
            for tensor in tensors:
                dtype = torch.promote_types(dtype, tensor.dtype)
        device = device or tensors[0].device
        shapes = [tensor.shape for tensor in tensors]
        return cls(list(parameters), shapes, placement, group=group, dtype=dtype, device=device)

    def replicated(self) -> VectorSpace:
        """The same vectors held whole on every rank."""
        return VectorSpace(self.names, self.shapes, "local", dtype=self.dtype, device=self.device)

    # -- arithmetic -----------------------------------------------------------------------------------------

    def zeros(self, *lead: int) -> Tensor:
        return torch.zeros(*lead, self.local_size, dtype=self.dtype, device=self.device)

    def randn(self, seed: int) -> Tensor:
        """Standard normal vector: bitwise the same global one for a seed, whatever placement and ranks."""
        return self._random(seed, lambda n, generator: torch.randn(n, generator=generator, dtype=self.dtype))

    def rademacher(self, seed: int) -> Tensor:
        """Vector of independent signs, the same global one for a seed."""

        def signs(n: int, generator: torch.Generator) -> Tensor:
            return 2 * torch.randint(0, 2, (n,), generator=generator).to(self.dtype) - 1

        return self._random(seed, signs)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """<x, y> (0-dim, float64): one small all-reduce."""
        return self.gram(x[None], y[None])[0, 0]

    def norm(self, x: Tensor) -> Tensor:
        """|x| (0-dim, float64): one small all-reduce."""
        return self.dot(x, x).clamp_min(0.0).sqrt()

    def gram(self, x: Tensor, y: Tensor, *, exact: bool = False) -> Tensor:
        """All inner products (m, n) in float64 of blocks x (m, L) and y (n, L): one small all-reduce.

        Products are taken in the vectors' dtype, float32 at least, and summed in float64; ``exact`` takes
        them in float64 too, so that the result is that of the numbers as stored.
        """
        return self.all_reduce(self.local_gram(x, y, exact=exact))

    def local_gram(self, x: Tensor, y: Tensor, *, exact: bool = False) -> Tensor:
        """This rank's part of `gram`, not yet summed over ranks."""
        dtype = torch.float64 if exact else torch.promote_types(torch.result_type(x, y), torch.float32)
        total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=self.device)
        with full_precision_matmul(self.device.type):
            for columns in self.columns():
                left = x[:, columns].to(dtype)
                right = left if y is x else y[:, columns].to(dtype)
                total += left @ right.T
        return total

    def combine(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """coefficients (n, m) @ x (m, L) -> (n, L), in the vectors' precision."""
        with full_precision_matmul(self.device.type):
            return coefficients.to(device=x.device, dtype=x.dtype) @ x

    def combine_(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """`combine` within x's own storage, n <= m: overwrites and returns ``x[:n]``, no other row."""
        n, coefficients = coefficients.shape[0], coefficients.to(device=x.device, dtype=x.dtype)
        with full_precision_matmul(self.device.type):
            for columns in self.columns():
                x[:n, columns] = coefficients @ x[:, columns]
        return x[:n]

    def columns(self) -> Iterator[slice]:
        """Slices that cover this rank's columns, a few at once."""
        width = CHUNK.get(self.device.type, CHUNK["cuda"])
        for start in range(0, self.local_size, width):
            yield slice(start, min(start + width, self.local_size))

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

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """Sum a tensor of any size over ranks, in place; returns it. Counted by its size in `traffic`."""
        if self.world_size > 1:
            dist.all_reduce(numbers, group=self.group)
            self._count_large(numbers)
        return numbers

    # -- between vectors and parameters ---------------------------------------------------------------------

    def gather(self, x: Tensor) -> tuple[Tensor, ...]:
        """The whole vector x (L,) as tensors in parameter shape, on every rank: one all-gather of P numbers.

        On one rank they are views of x.
        """
        parts = self._gather_flat(x).split(self.layout.numels)
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    @torch.no_grad()
    def scatter(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum whole, parameter-shaped tensors over ranks; this rank's part (L,) of it: one reduce-scatter."""
        if self.world_size == 1:
            return torch.cat([t.reshape(-1).to(self.dtype) for t in tensors])
        send = torch.zeros(self.world_size, self.layout.padded, dtype=self.dtype, device=self.device)
        self.layout.spread([t.reshape(-1) for t in tensors], send)
        received = send.new_empty(self.layout.padded)
        _reduce_scatter(received, send.view(-1), group=self.group)
        self._count_large(send)
        return self.layout.narrowed(received, self.rank)

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part (L,), a copy, of tensors whole on every rank, or shards: no communication."""
        parts = self._parts(tensors)
        if len(parts) == 1:  # of which flattening makes a view
            return parts[0].reshape(-1).to(self.dtype, copy=True)
        return _flatten_dense_tensors(parts).to(self.dtype)

    @torch.no_grad()
    def put(self, x: Tensor, tensors: Iterable[Tensor]) -> None:
        """Write the vector x (L,) into ``tensors`` in place: the reverse of `take`.

        Shards, and anything on one rank, without communication; tensors whole on each of several ranks by one
        all-gather.
        """
        torch._foreach_copy_(*self._matched(x, tensors))

    @torch.no_grad()
    def subtract(self, x: Tensor, tensors: Iterable[Tensor]) -> None:
        """Subtract the vector x (L,) from ``tensors`` in place; communication as in `put`."""
        torch._foreach_sub_(*self._matched(x, tensors))

    def gather_flat(self, x: Tensor) -> Tensor:
        """Whole rows (m, P) on every rank of a block x (m, L), one all-gather a row to bound the memory."""
        if self.world_size == 1:
            return x
        rows = x.new_empty(x.shape[0], self.size)
        for row, target in zip(x, rows, strict=True):
            target.copy_(self._gather_flat(row))
        return rows

    def slice_flat(self, x: Tensor) -> Tensor:
        """This rank's part (m, L) of whole rows x (m, P): no communication."""
        if self.world_size == 1:
            return x
        ranges = self.layout.flat_ranges(self.rank)
        return torch.cat([x[:, :0], *(x[:, start:stop] for start, stop in ranges)], dim=1)

    def exchange_rows(self, rows: Tensor) -> Tensor | None:
        """Each rank's own whole rows (m_r, P), as this rank's part (sum m_r, L) of all of them, in the order of ranks.

        None where no rank has any. One small all-reduce of the counts and one all-to-all of this rank's m_r P numbers.
        """
        if self.world_size == 1:
            return rows if len(rows) else None
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        counts[self.rank] = len(rows)
        numbers = self.all_reduce(counts).tolist()
        if sum(numbers) == 0:
            return None
        parts = []
        for rank in range(self.world_size):
            ranges = self.layout.flat_ranges(rank)
            parts.append(torch.cat([rows[:, :0], *(rows[:, a:b] for a, b in ranges)], dim=1).flatten())
        send = torch.cat(parts)
        received = send.new_empty(sum(numbers) * self.local_size)
        dist.all_to_all_single(
            received,
            send,
            [n * self.local_size for n in numbers],
            [part.numel() for part in parts],
            group=self.group,
        )
        self._count_large(send if send.numel() >= received.numel() else received)
        return received.view(sum(numbers), self.local_size)

    # -- inside ---------------------------------------------------------------------------------------------

    def _matched(self, x: Tensor, tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank holds of ``tensors``, and the parts of x (L,) that belong to it, whole where they are whole."""
        tensors = list(tensors)
        if self.world_size > 1 and not all(isinstance(tensor, DTensor) for tensor in tensors):
            return [tensor.detach() for tensor in tensors], list(self.gather(x))
        targets = self._parts(tensors)
        return targets, list(_unflatten_dense_tensors(x, targets))

    def _parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What this rank holds of each of ``tensors``; quick where that is all, for it is done several times a step."""
        tensors = list(tensors)
        if self.world_size > 1 or any(isinstance(tensor, DTensor) for tensor in tensors):
            return [self._part(i, tensor) for i, tensor in enumerate(tensors)]
        if tuple(tensor.shape for tensor in tensors) != self.shapes:
            return [self._part(i, tensor) for i, tensor in enumerate(tensors)]  # says which
        return tensors

    def _part(self, index: int, tensor: Tensor) -> Tensor:
        """What this rank holds of parameter ``index`` or a tensor like it: a shard or a slice, no copy."""
        if isinstance(tensor, DTensor):
            if self.placement != "sharded":
                raise UsageError(
                    f"{self.names[index]} is sharded over ranks but the vectors are {self.placement}: "
                    "build the space from the sharded parameters"
                )
            return tensor.to_local().detach()
        if tensor.shape != self.shapes[index]:
            raise UsageError(
                f"{self.names[index]}: a tensor of shape {tuple(tensor.shape)}; expected is {tuple(self.shapes[index])}"
            )
        if self.world_size == 1:
            return tensor.detach()
        low, high = self.layout.intervals[self.rank][index]
        return tensor.detach().reshape(-1)[low:high]

    def _random(self, seed: int, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Draw parameter by parameter, each from its own generator, so that only one is whole at a time."""
        parts = []
        for index, (low, high) in enumerate(self.layout.intervals[self.rank]):
            if low == high:
                continue
            generator = torch.Generator().manual_seed(_mixed_seed(seed, index))
            parts.append(draw(self.layout.numels[index], generator)[low:high].to(self.device))
        return torch.cat(parts) if parts else self.zeros()

    def _gather_flat(self, x: Tensor) -> Tensor:
        """The whole flat vector (P,) of x (L,)."""
        if self.world_size == 1:
            return x
        received = x.new_empty(self.world_size, self.layout.padded)
        _all_gather(received.view(-1), self.layout.widened(x, self.rank).contiguous(), group=self.group)
        self._count_large(received)
        return self.layout.collect(received)

    def _count_large(self, buffer: Tensor) -> None:
        self.traffic.large += 1
        self.traffic.bytes += buffer.numel() * buffer.element_size()


@lru_cache(maxsize=64)
def _layout(shapes: tuple[torch.Size, ...], placement: str, world_size: int) -> Layout:
    return Layout(shapes, placement, world_size)  # thousands of intervals, where there are many parameters and ranks


def _mixed_seed(seed: int, index: int) -> int:
    """One well spread 32-bit number for a pair: torch's CPU generator looks at no more bits of its seed."""
    digest = hashlib.blake2s(f"{seed} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _mesh_group(parameters: Mapping[str, Tensor]) -> dist.ProcessGroup:
    """The process group of FSDP2's mesh; every parameter in scope must be a first-dimension shard on it."""
    meshes: list[DeviceMesh] = []
    for name, tensor in parameters.items():
        if not isinstance(tensor, DTensor):
            raise UsageError(
                f"parameter {name} is not sharded while others are: shard the whole module with fully_shard"
            )
        mesh = tensor.device_mesh
        if mesh.ndim != 1 or tensor.placements != (Shard(0),) or (meshes and mesh != meshes[0]):
            raise UsageError(
                f"parameter {name} is placed as {tensor.placements} on {mesh}: "
                "only FSDP2's first-dimension shards, all on one 1-D mesh, are supported"
            )
        meshes.append(mesh)
    return meshes[0].get_group()
