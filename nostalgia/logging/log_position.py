"""How far a run's logs have come, and putting them back there: a resumed run writes every row exactly once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

LOGS = ("metrics.csv", "memory.csv")
TENSORBOARD = "tensorboard"


def log_position(run_dir: Path, tensorboard_root: Path) -> dict[str, int]:
    """Sizes in bytes of the logs, by relative path."""
    return {name: path.stat().st_size for name, path in _logs(run_dir, tensorboard_root).items()}


def sync_logs(run_dir: Path, tensorboard_root: Path) -> None:
    """See to it that what was written is on the disk: a checkpoint that counts on it must not outlive it."""
    for path in _logs(run_dir, tensorboard_root).values():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def rewind_logs(run_dir: Path, tensorboard_root: Path, position: Mapping[str, int]) -> None:
    """Cut every log back to ``position``; logs that did not exist then are removed."""
    for name, path in _logs(run_dir, tensorboard_root).items():
        size = position.get(name)
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


def _logs(run_dir: Path, tensorboard_root: Path) -> dict[str, Path]:
    found = {name: run_dir / name for name in LOGS}
    events = (tensorboard_root / TENSORBOARD).rglob("events.out.tfevents.*")
    found.update({path.relative_to(tensorboard_root).as_posix(): path for path in events})
    return {name: path for name, path in sorted(found.items()) if path.is_file()}
