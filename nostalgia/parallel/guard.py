"""Checks that ranks which must hold the same numbers still do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nostalgia.errors import RunFailedError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_consistency(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise RunFailedError, on every rank, naming the first of ``tensors`` that is not the same on all ranks.

    Compares one integer checksum a tensor, of the bits, by one small all-gather. Shards of FSDP2 differ by nature and
    are left out; so must be whatever else is spread over ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    whole = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
    if not whole:
        return
    mine = torch.stack([checksum(t) for t in whole.values()])
    every = mine.new_empty(dist.get_world_size(), len(mine))
    dist.all_gather_into_tensor(every.view(-1), mine)
    differs = (every != every[0]).any(dim=0)
    if bool(differs.any()):
        column = int(differs.nonzero()[0])
        ranks = (every[:, column] != every[0, column]).nonzero().flatten().tolist()
        raise RunFailedError(
            f"{where}: ranks have diverged: {list(whole)[column]} differs on rank {', '.join(map(str, ranks))} from "
            "rank 0; this run's numbers cannot be trusted from here on: start again from a checkpoint, and look for "
            "faulty hardware or code that changes parameters on one rank only"
        )


def checksum(tensor: Tensor) -> Tensor:
    """A position-dependent integer sum of a tensor's bits (0-dim int64), by wrapping arithmetic."""
    bits = tensor.detach().contiguous().view(-1)
    integers = bits.view(_INTEGERS[bits.element_size()]).long()
    weights = torch.arange(1, integers.numel() + 1, device=integers.device)
    return (integers * weights).sum()
