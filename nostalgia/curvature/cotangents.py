"""Output cotangents u with E u u^T = M, the metric of a loss in the network's outputs: one square root of a Gauss-Newton
matrix for all that is built of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.batches import num_rows
from nostalgia.curvature.losses import LOSSES
from nostalgia.data.transforms import uniform
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace


class OutputMetric:
    """Draws output cotangents u, E u u^T = M, as a function of the seed, the sample's number and the draw.

    M is diag(p) - p p^T for ``cross_entropy``, p = softmax(z / temperature), and 2 I for ``mse``. ``exact`` takes all
    columns of a root of M instead of draws.
    """

    def __init__(self, loss: str, temperature: float, draws: int, seed: int, exact: bool) -> None:
        if draws < 1 or not temperature > 0 or loss not in LOSSES:
            raise UsageError(
                f"draws={draws}, temperature={temperature}, loss={loss!r}: allowed are draws >= 1, temperature > 0, "
                f"loss {' or '.join(LOSSES)}"
            )
        self.loss, self.temperature, self.draws, self.seed, self.exact = loss, temperature, draws, seed, exact

    def cotangents(self, logits: Tensor, first: int) -> list[Tensor]:
        """Tensors (B, C) whose u u^T sum to M, in expectation or exactly; samples are numbered from ``first``."""
        count, classes = logits.shape
        if self.exact:
            eye = torch.eye(classes, dtype=logits.dtype, device=logits.device)
            return [self._rooted(logits, eye[c].expand(count, classes)) for c in range(classes)]
        numbers = torch.arange(first, first + count, device=logits.device)
        scale = self.draws**-0.5
        signs = (
            torch.where(uniform(self.seed, draw, numbers, classes) < 0.5, -1.0, 1.0).to(logits.dtype)
            for draw in range(self.draws)
        )
        return [scale * self._rooted(logits, z) for z in signs]

    def _rooted(self, logits: Tensor, z: Tensor) -> Tensor:
        """R z with R R^T = M: R = diag(p)^(1/2) - p (p^(1/2))^T, or 2^(1/2) I."""
        if self.loss == "mse":
            return 2**0.5 * z
        root = (logits / self.temperature).softmax(dim=1).sqrt()
        return root * z - root.square() * (root * z).sum(dim=1, keepdim=True)


def sample_numbers(batches: list[Any], space: VectorSpace, what: str) -> tuple[int, int]:
    """The number of samples of the ranks before this one, and of all; one small all-reduce."""
    counts = torch.zeros(space.world_size, dtype=torch.float64, device=space.device)
    counts[space.rank] = sum(num_rows(batch) for batch in batches)
    space.all_reduce(counts)
    if float(counts.sum()) == 0:
        raise UsageError(f"{what} of no samples; give at least one")
    return int(counts[: space.rank].sum()), int(counts.sum())
