"""The trainer, with one pixel of one batch of one rank made NaN:  nan_batch RANK TASK EPOCH STEP FILE WORDS...

The id of the damaged sample is left in FILE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nostalgia.data.stream import Step, TaskLoader
from nostalgia.train import main

rank, task, epoch, step, file = sys.argv[1:6]
original = TaskLoader.epoch


def damaged(self: TaskLoader, number: int, start_step: int = 0) -> Iterator[Step]:
    for one in original(self, number, start_step):
        here = (os.environ.get("RANK", "0"), self.name, str(number), str(one.step)) == (rank, task, epoch, step)
        if here and self.train:
            batch = one.micro_batches[-1]
            batch.images[0, 0, 0, 0] = torch.nan
            Path(file).write_text(str(int(batch.indices[0])))
        yield one


TaskLoader.epoch = damaged  # type: ignore[method-assign]
sys.exit(main(sys.argv[6:]))
