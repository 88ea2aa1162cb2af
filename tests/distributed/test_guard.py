"""Ranks that no longer hold the same parameters are found within `guard_every_n_steps`, and end together."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import diverging_run
from tests.ranks import run

PARAMETER = "model.layers.1.mlp.fc1.weight"
WORDS = (
    "--suite", "demo", "--quiet", "train.epochs=1", "train.head_warmup_epochs=0", "nostalgia.guard_every_n_steps=5",
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}]",
)  # fmt: skip


def test_a_parameter_that_differs_on_one_rank_ends_the_run(tmp_path: Path) -> None:
    words = [*WORDS, f"experiment.output_dir={tmp_path / 'runs'}"]
    done = run(diverging_run.main, PARAMETER, words, world_size=2)
    assert done.codes == [4, 4]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"epoch 1, step 5: ranks have diverged: {PARAMETER} differs on rank 1 from rank 0" in error
    assert "Traceback" not in done.stderr
