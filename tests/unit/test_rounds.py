"""What a run says of a finished task."""

from __future__ import annotations

import io
from types import SimpleNamespace

import torch
from nostalgia.experiment.rounds import Experiment
from rich.console import Console

from nostalgia.experiment.state import RunState
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection import CurvatureMemory


def test_a_full_memory_of_the_mean_says_how_many_directions_it_holds() -> None:
    space, memory, text = VectorSpace.of({"w": torch.zeros(6)}), CurvatureMemory(2, "average", 8), io.StringIO()
    for rows in (slice(0, 2), slice(2, 4)):
        pairs = Eigenpairs(
            eigenvalues=torch.tensor([2.0, 1.0], dtype=torch.float64),
            eigenvectors=torch.eye(6)[rows],
            residuals=torch.zeros(2, dtype=torch.float64),
            converged=torch.ones(2, dtype=torch.bool),
            products=2,
            collectives=0,
            bytes_moved=0,
            seconds=0.0,
            tol=0.1,
            space=space,
        )
        update = memory.update(pairs)
    task = SimpleNamespace(index=2, name="task2")
    run = SimpleNamespace(
        parts=SimpleNamespace(memory=memory, tasks=[SimpleNamespace(index=1, name="task1"), task]),
        console=Console(file=text, width=200),
        state=RunState(matrix=[[0.5, None], [0.5, 0.5]]),
        _round_elapsed=lambda: 1.0,
    )
    Experiment._report(run, task, pairs, update)  # type: ignore[arg-type]
    assert memory.columns == 2
    assert "the memory is full (2 directions): 2 dropped" in text.getvalue()
