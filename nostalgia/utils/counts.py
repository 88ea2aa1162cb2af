"""What several parts of a run count alike."""

from __future__ import annotations

import math

PRODUCTS_PER_PAIR, PRODUCTS_AT_LEAST = 3, 10  # what Lanczos usually needs to residuals of a percent


def steps_per_epoch(images: int, global_batch: int, most: int | None = None) -> int:
    """Optimizer steps over ``images``, the last one of what is left; at most ``most``.

    >>> steps_per_epoch(100, 32), steps_per_epoch(100, 32, 2)
    (4, 2)
    """
    steps = math.ceil(images / global_batch)
    return steps if most is None else min(steps, most)


def products_of(pairs: int) -> int:
    """Curvature products that Lanczos usually takes for ``pairs`` eigenpairs."""
    return PRODUCTS_PER_PAIR * pairs + PRODUCTS_AT_LEAST
