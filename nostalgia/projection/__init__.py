"""What finished tasks forbid, and how a training step obeys."""

from nostalgia.projection.memory import CurvatureMemory, MemoryUpdate
from nostalgia.projection.projector import GradientProjector

__all__ = ["CurvatureMemory", "GradientProjector", "MemoryUpdate"]
