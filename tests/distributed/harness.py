"""Runs a test case in several gloo processes under the real launcher and returns what each rank returned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def launch_command(world_size: int) -> list[str]:
    """The torchrun command line for ``world_size`` processes on this machine, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]


def cpu_environment(**extra: str) -> dict[str, str]:
    """Environment of a CPU run: one thread a process, the checkout importable, no hub access."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    defaults = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **defaults, **extra}


def run_ranks(case: str, world_size: int, timeout: float = 240, **kwargs: Any) -> list[Any]:
    """Call ``module:function`` with ``kwargs`` on every rank; returns each rank's JSON-able result, in rank order.

    Raises AssertionError with the ranks' output when any of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch_command(world_size), "-m", "tests.distributed.worker", case, json.dumps(kwargs), folder]
        done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise AssertionError(f"{case} failed on {world_size} ranks:\n{done.stdout}\n{done.stderr}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]
