"""What starting the program as its users do takes: the launcher's command line, the environment of a CPU run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launch_command(world_size: int) -> list[str]:
    """The torchrun command line for ``world_size`` processes on this machine, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]


def cpu_environment(**extra: str) -> dict[str, str]:
    """Environment of a CPU run: one thread a process, the checkout importable, no hub access."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    defaults = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **defaults, **extra}
