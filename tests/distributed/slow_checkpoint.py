"""The program, but a checkpoint takes longer to write than a rank waits for another that has ended."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import nostalgia.training.loop as loop
from nostalgia.checkpoint.store import CheckpointContents, CheckpointStore
from nostalgia.errors import RunFailedError
from nostalgia.parallel.failure import GRACE_SECONDS
from tests.ranks import train

STEP = 2


def slow(write: Any) -> Any:
    def written(store: CheckpointStore, number: int, contents: CheckpointContents) -> Any:
        time.sleep(2 * GRACE_SECONDS)
        return write(store, number, contents)

    return written


def ending(step: Any, how: str, calls: list[None]) -> Any:
    def train_step(*given: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == STEP and os.environ["RANK"] == "1":
            if how == "error":
                raise RunFailedError("rank 1 cannot go on")
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given, **options)

    return train_step


def main(how: str, words: list[str]) -> int:
    CheckpointStore._write = slow(CheckpointStore._write)  # type: ignore[method-assign]
    loop.train_step = ending(loop.train_step, how, [])
    return train(words)
