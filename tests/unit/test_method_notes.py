"""What a method says of a finished task."""

from __future__ import annotations

import torch

from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.eigenspace import Eigenspace, EigenspaceConfig


def test_a_full_memory_of_the_mean_says_how_many_directions_it_holds() -> None:
    space = VectorSpace.of({"w": torch.zeros(6)})
    eigenspace = Eigenspace(EigenspaceConfig(top_k=2, merge="average"))
    memory = eigenspace.make(space, num_tasks=2)
    for rows in (slice(0, 2), slice(2, 4)):
        eigenspace.pairs = Eigenpairs(
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
        eigenspace.update = memory.update(eigenspace.pairs)
    assert memory.columns == 2
    assert "the memory is full (2 directions): 2 dropped" in eigenspace.note()
