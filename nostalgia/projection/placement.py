"""Where the memory's basis lies: whole on every rank, or in the slices the solver made."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.utils.sizes import num_bytes

PLACEMENTS = ("auto", "replicated", "sharded")
# Where the user sets no budget, `auto` keeps the basis on every rank up to this share of the device's memory.
BUDGET_SHARE = 0.1


@dataclass(frozen=True)
class BasisPlacement:
    """A decision, and the reason for it in a few words."""

    name: str  # "replicated", "sharded", or "whole" for one process
    reason: str = ""

    @property
    def replicated(self) -> bool:
        return self.name == "replicated"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def place_basis(
    placement: str, space: VectorSpace, columns: int, itemsize: int, budget_bytes: float | None = None
) -> BasisPlacement:
    """Decide for a basis of at most ``columns`` vectors of ``space``, ``itemsize`` bytes a number.

    Only DDP's slices leave a choice. ``auto`` takes whole vectors, whose projection needs no collective of size P,
    where they fit in ``budget_bytes`` (default: a tenth of the device's memory) on every rank; ranks agree by one small
    all-reduce, so all must call. Raises UsageError for ``replicated`` over FSDP2's shards.
    """
    if space.placement == "local":
        return BasisPlacement("whole", "one process")
    if space.placement == "sharded":
        if placement == "replicated":
            raise UsageError(
                "method.basis_placement=replicated: under FSDP2 the basis is sharded as the parameters are; "
                "use auto or sharded"
            )
        return BasisPlacement("sharded", "as FSDP2 shards the parameters")
    if placement != "auto":
        return BasisPlacement(placement, "by method.basis_placement")
    whole = columns * space.size * itemsize
    budget = default_budget(space.device) if budget_bytes is None else budget_bytes
    votes = space.all_reduce(torch.tensor([float(whole <= budget)], dtype=torch.float64, device=space.device))
    fits = int(votes) == space.world_size
    reason = f"auto: {num_bytes(whole)} whole, allowed {num_bytes(budget)} a rank"
    if not fits and whole <= budget:
        reason += ", less on another"
    return BasisPlacement("replicated" if fits else "sharded", reason)


def default_budget(device: torch.device) -> float:
    """A share of the memory of the device, by the ranks of this machine that use it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        here = -(-ranks // torch.cuda.device_count())
        return BUDGET_SHARE * torch.cuda.get_device_properties(device).total_memory / here
    return BUDGET_SHARE * psutil.virtual_memory().total / ranks
