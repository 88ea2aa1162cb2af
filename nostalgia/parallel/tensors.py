"""Tensors between the ranks and rank 0's files: whole on rank 0's CPU, and back to whatever each rank holds.

Every function is a collective: all ranks call it, with the same names in the same order. Values arrive to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nostalgia.errors import NotFoundError
from nostalgia.linalg.vector_space import VectorSpace


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return world_size() == 1 or dist.get_rank() == 0


def carrier(device: torch.device) -> torch.device:
    """Where a tensor of ``device`` must lie for a collective: a group of NCCL alone takes none on the CPU."""
    if world_size() == 1:
        return device
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0])


def placed_as(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, whole on every rank, as ``parameter`` lies: this rank's shard of it where that is a DTensor."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, no copy and apart from autograd: its shard of a DTensor, else all of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of ``tensors`` whole on every rank, apart from autograd: shards of FSDP2 by one all-gather of them all."""
    shards = {str(place): tensor for place, tensor in enumerate(tensors) if isinstance(tensor, DTensor)}
    if not shards:
        return [tensor.detach() for tensor in tensors]
    space = VectorSpace.of(shards)
    whole = dict(zip(shards, space.gather(space.take(shards.values())), strict=True))
    return [whole[str(place)].to(t.dtype) if str(place) in whole else t.detach() for place, t in enumerate(tensors)]


@torch.no_grad()
def to_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on rank 0's CPU; empty on the other ranks. Plain tensors must be the same on all ranks."""
    values = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
        if is_main():
            values[name] = whole.to("cpu", copy=True).contiguous()
    return values


@torch.no_grad()
def from_main(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], source: str) -> None:
    """Put rank 0's ``values`` into ``targets``, in place; ``source`` names where they are from in an error.

    Raises NotFoundError, on every rank, for a name that is missing, another shape or dtype, or a value not finite.
    """
    problem = broadcast_object(_misfit(targets, values) if is_main() else "")
    if problem:
        raise NotFoundError(f"{source}: {problem}")
    for name, target in targets.items():
        device = carrier(target.to_local().device if isinstance(target, DTensor) else target.device)
        whole = values[name].to(device) if is_main() else torch.empty(target.shape, dtype=target.dtype, device=device)
        if world_size() > 1:
            dist.broadcast(whole, 0)
        if isinstance(target, DTensor):
            mine = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(mine.to_local())
        else:
            target.copy_(whole)


def rows_to_main(block: Tensor, space: VectorSpace) -> Iterator[Tensor]:
    """The rows (P,) of a block (m, P_local) one after the other, whole on rank 0's CPU (elsewhere: empty tensors)."""
    for row in block:
        whole = space.gather_flat(row[None])[0]
        yield whole.to("cpu", copy=True) if is_main() else torch.empty(0)


def rows_from_main(rows: Iterator[Tensor] | None, count: int, dtype: torch.dtype, space: VectorSpace) -> Tensor:
    """A block (count, P_local) in ``dtype`` from rank 0's whole rows (P,); ``rows`` is None on the other ranks."""
    block = torch.empty(count, space.local_size, dtype=dtype, device=space.device)
    for target in block:
        if rows is not None:
            whole = next(rows).to(device=space.device, dtype=dtype)
        else:
            whole = torch.empty(space.size, dtype=dtype, device=space.device)
        if world_size() > 1:
            dist.broadcast(whole, 0)
        target.copy_(space.slice_flat(whole[None])[0])
    return block


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` (small, plain) on all ranks."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value`` (small, plain), in rank order, on all ranks."""
    if world_size() == 1:
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def _misfit(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> str:
    """What is wrong with ``values`` for ``targets``, in words; empty when they fit."""
    for name, target in targets.items():
        if name not in values:
            return f"{name} is missing"
        value = values[name]
        if value.shape != target.shape or value.dtype != target.dtype:
            return (
                f"{name} has shape {tuple(value.shape)} and {value.dtype}, expected are {tuple(target.shape)} and "
                f"{target.dtype}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return f"{name} holds values that are not finite"
    return ""
