"""The eigenpairs that a run takes for its prediction alone, where its method takes no curvature."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import torch
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.experiment.analysis import Analysis
from nostalgia.experiment.components import build_components
from nostalgia.experiment.method_choice import complete_method
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.models.heads import make_head

WORDS = (
    "--suite", "demo", "method=finetune", "analysis.predict_forgetting=true", "analysis.top_k=3", "curvature.kind=ggn",
    "curvature.num_samples=16", "analysis.captured_energy_samples=0",
)  # fmt: skip


def pairs_of(solver: str, folder: Path) -> Eigenpairs:
    config = parse([*WORDS, f"curvature.solver={solver}"]).config
    complete_method(config)
    run = build_components(config, Accelerator(cpu=True), "32")
    task = run.tasks[0]
    run.heads[task.head] = make_head(run.backbone.feature_dim, len(task.classes), seed=0)
    run.norm_statistics.append({})
    pairs = Analysis(run, folder, Mock(), print).task_ended(task)
    assert pairs is not None
    return pairs


def test_they_are_those_of_the_solver_that_is_named(tmp_path: Path) -> None:
    rows, lanczos = pairs_of("rows", tmp_path), pairs_of("lanczos", tmp_path)
    assert rows.products == 0 < lanczos.products
    # Rows draw their output cotangents: a matrix around the same one.
    torch.testing.assert_close(rows.eigenvalues, lanczos.eigenvalues, rtol=0.5, atol=0)
