"""What a rank does while others are stopped: work together without end, and watch."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from nostalgia.parallel.failure import FailureWatch


def work_for_ever(folder: Path, heartbeat_seconds: float) -> None:
    """All-reduces until something ends it; ``<folder>/working<rank>`` appears once ranks have worked together."""
    dist.init_process_group("gloo")
    FailureWatch(heartbeat_seconds)
    rounds = 0
    while True:
        dist.all_reduce(torch.ones(1))
        rounds += 1
        if rounds == 20:
            (folder / f"working{os.environ['RANK']}").touch()
