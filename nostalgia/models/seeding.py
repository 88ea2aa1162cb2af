"""Random initialisation that depends on a seed alone and leaves the process's random state as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block, tensors are made on the CPU and drawn from ``seed``; the global state is put back
    after.

    Only the CPU generator is touched: ``torch.manual_seed`` would reseed every GPU as well, and ``fork_rng``
    would have to know them all.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)
