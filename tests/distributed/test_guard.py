"""Ranks that no longer hold the same parameters are found within `guard_every_n_steps`, and end together."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.distributed.harness import ROOT, cpu_environment, launch_command

PARAMETER = "model.layers.1.mlp.fc1.weight"
WORDS = (
    "--suite", "demo", "--quiet", "train.epochs=1", "train.head_warmup_epochs=0", "nostalgia.guard_every_n_steps=5",
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}]",
)  # fmt: skip


def test_a_parameter_that_differs_on_one_rank_ends_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [*launch_command(2), "-m", "tests.distributed.diverging_run", PARAMETER, *WORDS,
         f"experiment.output_dir={tmp_path / 'runs'}"],
        cwd=ROOT, env=cpu_environment(NOSTALGIA_EXIT_FILE=str(tmp_path / "code")), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert (tmp_path / "code").read_text() == "4"
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"epoch 1, step 5: ranks have diverged: {PARAMETER} differs on rank 1 from rank 0" in error
    assert "Traceback" not in done.stderr
