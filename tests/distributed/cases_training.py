"""Whole short runs in one group of ranks, one after the other, and what they measured at full precision."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from nostalgia.analysis.drawing import run_drawers
from nostalgia.analysis.run_folder import read_run
from nostalgia.config import parse
from nostalgia.config.checks import check_launch
from nostalgia.experiment import run as whole_run
from nostalgia.experiment.observer import PhaseObserver
from nostalgia.parallel.accelerator import launch_info, make_accelerator
from nostalgia.parallel.coordination import from_main

WORDS = (
    "--suite", "demo", "--quiet", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.patch_size=4", "train.epochs=2", "train.warmup_epochs=0", "train.head_warmup_epochs=1",
    "train.lr=3e-3", "train.log_every_n_steps=1", "nostalgia.top_k=4", "nostalgia.num_samples=31",
    "nostalgia.tol=0.01", "nostalgia.guard_every_n_steps=5", "nostalgia.spectral_density=true",
    "nostalgia.density_runs=2", "nostalgia.density_steps=4", "logger.report=false",
    "dataset.augment=default",
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}, {dataset: digits, classes: [2, 3]}]",
)  # fmt: skip


def check_runs(runs: dict[str, list[str]]) -> dict[str, Any]:
    """``runs``: extra words by name; names that begin with ``fsdp`` run under FSDP2."""
    return {name: measured(words, fsdp=name.startswith("fsdp")) for name, words in runs.items()}


def measured(words: list[str], *, fsdp: bool) -> dict[str, Any]:
    """One run: (loss, gradient norm, projected fraction) of every step, and what it left in its files."""
    steps: list[tuple] = []
    step_taken = PhaseObserver.step_taken

    def record_step(self: PhaseObserver, step: int, record: Any) -> None:
        steps.append((record.loss, record.grad_norm, record.metrics.get("projected_fraction")))
        step_taken(self, step, record)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("ACCELERATE_USE_FSDP", "true" if fsdp else "false")
        patch.setattr(PhaseObserver, "step_taken", record_step)
        request = parse([*WORDS, f"experiment.output_dir={folder}", *words])
        launch = launch_info()
        precision = check_launch(request.config, device_type=launch.device_type, world_size=launch.world_size)
        accelerator = make_accelerator(launch, precision)
        try:
            path = whole_run.run(request, accelerator, precision)
            left = left_behind(path) if accelerator.is_main_process else None
            return {"steps": steps, **from_main(accelerator, left)}
        finally:
            forget_accelerate()


def left_behind(folder: Path) -> dict[str, Any]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    leak, split = rows[0].index("leak"), rows[0].index("split")
    forgetting = folder / "results/forgetting_prediction.json"
    return {
        "forgetting": json.loads(forgetting.read_text())["rows"] if forgetting.exists() else [],
        "leaks": [float(row[leak]) for row in rows[1:] if row[leak] and row[split] == "val"],
        "accuracies": json.loads((folder / "results/results.json").read_text())["accuracy_matrix"],
        "spectrum_panels": len(run_drawers(read_run(folder))["spectrum"]().axes)
        if list(folder.glob("curvature/*.json"))
        else 0,
        "curvature": [json.loads(path.read_text()) for path in sorted((folder / "curvature").glob("*.json"))],
    }


def forget_accelerate() -> None:
    """Let the next Accelerator of this process choose anew; the process group stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not PartialState._shared_state
