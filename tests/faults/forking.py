"""Runs nostalgia.train in forked processes, which may be killed at a chosen event: a start costs no imports.

Events are the moments before and after whatever moves a run on: optimizer steps, products, writes and renames of
files. Import this before anything starts threads.
"""

from __future__ import annotations

import csv
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SMALL = (
    "--suite", "demo", "--quiet", "train.epochs=2", "train.head_warmup_epochs=1", "train.max_steps_per_epoch=4",
    "nostalgia.top_k=4", "nostalgia.num_samples=32", "nostalgia.tol=0.1", "train.log_every_n_steps=1",
    "train.checkpoint_every_steps=3", "nostalgia.checkpoint_every_n_products=5", "train.max_eval_batches=2",
    "model.config.hidden_dropout_prob=0.1", "logger.tensorboard=false",
)  # fmt: skip


class Ranks:
    """One run in ``world_size`` forked processes."""

    def __init__(
        self,
        words: Sequence[str],
        world_size: int = 1,
        *,
        fsdp: bool = False,
        kill: tuple[int, int] | None = None,
        log: Path,
        setup: Callable[[int], None] | None = None,
    ) -> None:
        """``kill``: (rank, event) at which that rank kills itself; ``setup(rank)`` runs first in each process."""
        port = _free_port()
        self.pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(words, rank, world_size, port, fsdp, kill, log, setup)
            self.pids.append(pid)

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit codes (-9 for one killed); when one process is killed the others are too, as a launcher would."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + timeout
        while len(codes) < len(self.pids):
            for pid in self.pids:
                if pid in codes:
                    continue
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid] == -signal.SIGKILL:
                        self.kill(codes)
            if time.monotonic() > deadline:
                self.kill(codes)
                raise AssertionError(f"still running after {timeout} s")
            time.sleep(0.01)
        return [codes[pid] for pid in self.pids]

    def kill(self, ended: dict[int, int] | None = None) -> None:
        for pid in self.pids:
            if pid not in (ended or {}):
                os.kill(pid, signal.SIGKILL)

    def send(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)


def run(words: Sequence[str], world_size: int = 1, *, timeout: float = 300, **options: Any) -> list[int]:
    return Ranks(words, world_size, **options).wait(timeout)


def outcome(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common to the bit: weights, memory, matrix, every logged number."""
    import json

    from nostalgia.checkpoint.files import read_tensors
    from nostalgia.checkpoint.store import newest

    last = newest(folder)
    assert last is not None
    assert last.manifest["kind"] == "end_of_task"
    tensors = {k: v for k, v in last.tensors().items() if not k.startswith("ranks/")}
    memory = read_tensors(folder / last.state()["curvature"]["memory"]["file"])["basis"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in rows:
        row.pop("images_per_s")
    results = json.loads((folder / "results" / "results.json").read_text())
    return {
        "tensors": {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items()},
        "memory": memory.numpy().tobytes(),
        "matrix": results["accuracy_matrix"],
        "fwt": results["fwt"],
        "rows": rows,
    }


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is not the same, by name."""
    found = [key for key in ("memory", "matrix", "fwt") if one[key] != two[key]]
    found += [key for key in one["tensors"] | two["tensors"] if one["tensors"].get(key) != two["tensors"].get(key)]
    if one["rows"] != two["rows"]:
        pairs = zip(one["rows"], two["rows"], strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), "end")
        found.append(f"metrics.csv row {first} ({len(one['rows'])} and {len(two['rows'])} rows)")
    return found


def preload() -> None:
    """Import what a run needs, once, before forking."""
    import torch

    torch.set_num_threads(1)
    import matplotlib
    import peft  # noqa: F401

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import sklearn.datasets  # noqa: F401
    import transformers

    import nostalgia.experiment.program  # noqa: F401

    _ = transformers.ViTModel, transformers.get_scheduler


def _child(
    words: Sequence[str],
    rank: int,
    world_size: int,
    port: int,
    fsdp: bool,
    kill: tuple[int, int] | None,
    log: Path,
    setup: Callable[[int], None] | None,
) -> None:
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        if world_size > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        if fsdp:
            os.environ["ACCELERATE_USE_FSDP"] = "true"
        if setup is not None:
            setup(rank)
        count_events(kill[1] if kill is not None and kill[0] == rank else None)
        from nostalgia.train import main

        code = main(list(words))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def count_events(kill_at: int | None) -> None:
    """Count events from here on; SIGKILL at number ``kill_at``."""
    import nostalgia.checkpoint.files as files
    import nostalgia.training.loop as loop
    from nostalgia.evaluation import accuracy
    from nostalgia.linalg.krylov import Krylov
    from nostalgia.reporting.csv_log import CsvLog

    seen = [0]

    def event() -> None:
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            event()
            result = original(*args, **kwargs)
            event()
            return result

        setattr(owner, name, wrapped)

    for owner, name in (
        (loop, "train_step"),
        (Krylov, "expand"),
        (accuracy, "loss_sum"),
        (files, "_write_synced"),
        (CsvLog, "write"),
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
    ):
        around(owner, name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
