"""Gradient projection: removes protected directions from gradients and steps."""

from nostalgia.projection.kronecker_memory import KroneckerMemory
from nostalgia.projection.memory import CurvatureMemory, MemoryUpdate
from nostalgia.projection.projector import GradientProjector

__all__ = ["CurvatureMemory", "GradientProjector", "KroneckerMemory", "MemoryUpdate"]
