"""A checkpoint that is being written when another rank ends is whole all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from nostalgia.checkpoint.store import newest
from tests.distributed import slow_checkpoint
from tests.ranks import run

WORDS = (
    "--suite", "demo", "--quiet", "train.epochs=1", "train.head_warmup_epochs=0", "train.checkpoint_every_epochs=0",
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "every", "code", "line"),
    [
        ("signal", 0, 75, "stopped with a checkpoint written"),
        ("error", 1, 4, "rank 1 cannot go on"),  # the first step's checkpoint is under way then
    ],
)
def test_it_is_whole(tmp_path: Path, how: str, every: int, code: int, line: str) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "--run-dir", str(folder), f"train.checkpoint_every_steps={every}"]
    done = run(slow_checkpoint.main, how, words, world_size=2)
    assert done.codes == [code, code]
    (error,) = [found for found in done.stderr.splitlines() if found.startswith("error: ")]
    assert line in error
    assert newest(folder) is not None
