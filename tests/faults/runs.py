"""Runs of nostalgia.train that may be killed at a chosen event, and what two runs must have in common.

Events are the moments before and after whatever moves a run on: optimizer steps, products, writes and renames of
files.
"""

from __future__ import annotations

import csv
import os
import re
import signal
from pathlib import Path
from typing import Any

from tests.ranks import train

SMALL = (
    "--suite", "demo", "--quiet", "train.epochs=2", "train.head_warmup_epochs=1", "train.max_steps_per_epoch=4",
    "nostalgia.top_k=4", "nostalgia.num_samples=32", "nostalgia.tol=0.1", "train.log_every_n_steps=1",
    "train.checkpoint_every_steps=3", "nostalgia.checkpoint_every_n_products=5", "train.max_eval_batches=2",
    "model.config.hidden_dropout_prob=0.1", "logger.tensorboard=false",
    "dataset.augment=default",
)  # fmt: skip


def disturbed(words: list[str], kill: tuple[int, int] | None) -> int:
    """``nostalgia.train`` on this rank; ``kill``: (rank, event) at which that rank kills itself."""
    rank = int(os.environ.get("RANK", "0"))
    count_events(kill[1] if kill is not None and kill[0] == rank else None)
    return train(words)


def outcome(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common to the bit: weights, memory, matrix, every logged number."""
    import json

    from nostalgia.checkpoint.files import read_tensors
    from nostalgia.checkpoint.store import newest

    last = newest(folder)
    assert last is not None
    assert last.manifest["kind"] == "end_of_task"
    tensors = {k: v for k, v in last.tensors().items() if not k.startswith("ranks/")}
    token = re.compile("_[0-9a-f]{8}(?=[.])")  # of a file's name, drawn anew in each run
    vectors = {
        token.sub("", name): {key: t.numpy().tobytes() for key, t in read_tensors(folder / name).items()}
        for name in last.manifest["references"]
    }
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in rows:
        row.pop("images_per_s")
    results = json.loads((folder / "results" / "results.json").read_text())
    return {
        "tensors": {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items()},
        "vectors": vectors,
        "matrix": results["accuracy_matrix"],
        "class_incremental": results["class_incremental"],
        "fwt": results["fwt"],
        "rows": rows,
    }


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is not the same, by name."""
    found = [key for key in ("vectors", "matrix", "class_incremental", "fwt") if one[key] != two[key]]
    found += [key for key in one["tensors"] | two["tensors"] if one["tensors"].get(key) != two["tensors"].get(key)]
    if one["rows"] != two["rows"]:
        pairs = zip(one["rows"], two["rows"], strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), "end")
        found.append(f"metrics.csv row {first} ({len(one['rows'])} and {len(two['rows'])} rows)")
    return found


def count_events(kill_at: int | None) -> None:
    """Count events from here on; SIGKILL at number ``kill_at``."""
    import nostalgia.checkpoint.files as files
    import nostalgia.training.loop as loop
    from nostalgia.evaluation import accuracy
    from nostalgia.linalg.krylov import Krylov
    from nostalgia.logging.csv_log import CsvLog

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
        (accuracy, "correct_of_all_heads"),
        (files, "_write_synced"),
        (CsvLog, "write"),
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
    ):
        around(owner, name)
