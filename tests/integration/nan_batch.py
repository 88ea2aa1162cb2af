"""The trainer, with one pixel of one batch of one rank made NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from nostalgia.data.stream import Step, TaskLoader
from tests.ranks import train


def main(rank: int, task: str, epoch: int, step: int, file: Path, words: list[str]) -> int:
    """``nostalgia.train`` with a damaged batch on ``rank``; the id of the damaged sample is left in ``file``."""
    original = TaskLoader.epoch

    def damaged(self: TaskLoader, number: int, start_step: int = 0) -> Iterator[Step]:
        for one in original(self, number, start_step):
            here = (os.environ.get("RANK", "0"), self.name, number, one.step) == (str(rank), task, epoch, step)
            if here and self.train:
                batch = one.micro_batches[-1]
                batch.images[0, 0, 0, 0] = torch.nan
                file.write_text(str(int(batch.indices[0])))
            yield one

    TaskLoader.epoch = damaged  # type: ignore[method-assign]
    return train(words)
