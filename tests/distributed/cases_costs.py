"""What a solve and its memory cost a rank: bytes of tensors held, and collectives as torch.distributed issues them."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nostalgia.curvature import HessianOperator
from nostalgia.linalg.lanczos import LanczosProgress, lanczos
from nostalgia.parallel.modules import named_parameters
from nostalgia.projection import CurvatureMemory, GradientProjector

RANK = 4
FULL = 2 * RANK + 16  # products after which the solver's basis has no row to spare


def network() -> nn.Module:
    """P = 9,928 in float64: every dimension a multiple of 8, so that all shards are equal."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                         nn.Linear(64, 8)).double()  # fmt: skip


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "bare":
        return model
    if wrap == "ddp":
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def share(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of 30 samples, not the same number on 4 or 8 ranks, in batches of 5."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(30, 16, generator=generator).double(), torch.arange(30) % 8
    mine = torch.arange(30).tensor_split(ranks)[rank]
    return [(inputs[i], labels[i]) for i in mine.split(5)]


class Collectives(TorchDispatchMode):
    """Records every collective that reaches torch's c10d operators: its name and the numbers in its largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "c10d" in func.namespace:
            tensors = [t for a in args for t in (a if isinstance(a, Sequence) else [a]) if isinstance(t, Tensor)]
            self.calls.append((func._opname, max(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))


def live_bytes() -> int:
    """Bytes of the storages of all tensors of this process that Python knows of, each once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def costs(model: nn.Module) -> dict[str, Any]:
    """One eigensolve, the memory it fills, and the projector of the next task."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    operator = HessianOperator(model, loss_fn, share(rank, ranks), retain_graph=False)
    operator.loss()  # samples are counted once
    memory = CurvatureMemory(RANK, placement="sharded")
    before = live_bytes()
    held, small = 0, [0]  # small collectives so far, after each product

    with Collectives() as seen:

        def note(progress: LanczosProgress) -> None:
            nonlocal held
            small.append(sum(numbers < operator.size for _, numbers in seen.calls))
            if progress.products == FULL:
                held = live_bytes() - before

        pairs = lanczos(operator, RANK, tol=1e-2, callback=note)
        large = [call for call in seen.calls if call[1] >= operator.size]
    memory.update(pairs)
    assert memory.basis is not None
    assert memory.columns == RANK
    projector = GradientProjector(memory, named_parameters(model))
    anchor = projector.state()["anchor"].rows
    return {
        "sizes": [operator.size, operator.space.local_size],
        "solve": held,
        "q": memory.basis.untyped_storage().nbytes(),
        "anchor": anchor.untyped_storage().nbytes(),
        "gathered": sum(t.untyped_storage().nbytes() for t in operator._network.theta),
        "products": pairs.products,
        "collectives": [pairs.collectives, len(seen.calls)],
        "large": sorted(Counter(name for name, _ in large).items()),
        "small_an_iteration": max(b - a for a, b in pairwise(small)),
    }


def check(wraps: list[str]) -> dict[str, dict[str, Any]]:
    return {wrap: costs(wrapped(network(), wrap)) for wrap in wraps}
