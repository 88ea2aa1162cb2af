"""What finished tasks forbid, and how a training step obeys."""

from nostalgia.projection.kronecker_memory import KroneckerMemory
from nostalgia.projection.memory import CurvatureMemory, MemoryUpdate
from nostalgia.projection.projector import GradientProjector

__all__ = ["CurvatureMemory", "GradientProjector", "KroneckerMemory", "MemoryUpdate"]
