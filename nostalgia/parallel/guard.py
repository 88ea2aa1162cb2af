"""Checks that ranks which must hold the same numbers still do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nostalgia.errors import RunFailedError
from nostalgia.parallel.tensors import carrier

PIECE = 2**24  # numbers of a tensor that are widened at once
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_consistency(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise RunFailedError, on every rank, naming the first of ``tensors`` that is not the same on all ranks."""
    if found := differing(tensors):
        name, ranks = found
        raise RunFailedError(
            f"{where}: ranks have diverged: {name} differs on rank {', '.join(map(str, ranks))} from "
            "rank 0; this run's numbers cannot be trusted from here on: start again from a checkpoint, and look for "
            "faulty hardware or code that changes parameters on one rank only"
        )


@torch.no_grad()
def differing(tensors: Mapping[str, Tensor]) -> tuple[str, list[int]] | None:
    """The first of ``tensors`` that is not the same on all ranks, and the ranks that differ from rank 0; None where all are.

    A collective with the same names everywhere. Compares one integer checksum a tensor, of the bits, by one small all-gather.
    Shards of FSDP2 differ by nature and are left out; so must be whatever else is spread over ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    whole = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
    if not whole:
        return None
    device = carrier(next(iter(whole.values())).device)
    mine = torch.stack([checksum(t).to(device) for t in whole.values()])
    every = mine.new_empty(dist.get_world_size(), len(mine))
    dist.all_gather_into_tensor(every.view(-1), mine)
    differs = (every != every[0]).any(dim=0)
    if not bool(differs.any()):
        return None
    column = int(differs.nonzero()[0])
    return list(whole)[column], (every[:, column] != every[0, column]).nonzero().flatten().tolist()


def checksum(tensor: Tensor) -> Tensor:
    """A position-dependent integer sum of a tensor's bits (0-dim int64), by wrapping arithmetic."""
    bits = tensor.detach().contiguous().view(-1)
    integers = bits.view(_INTEGERS[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(integers), PIECE):  # a memory's basis has the size of many networks
        part = integers[start : start + PIECE].long()
        total += (part * torch.arange(start + 1, start + len(part) + 1, device=part.device)).sum()
    return total
