"""Continual fine-tuning of vision backbones that projects out what earlier tasks need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CurvatureMemory",
    "GGNOperator",
    "GradientProjector",
    "HessianOperator",
    "KroneckerMemory",
    "kronecker_factors",
    "lanczos",
]

if TYPE_CHECKING:
    from nostalgia.curvature.kronecker import kronecker_factors
    from nostalgia.curvature.operators import GGNOperator, HessianOperator
    from nostalgia.linalg.lanczos import lanczos
    from nostalgia.projection import CurvatureMemory, GradientProjector, KroneckerMemory

_HOME = {
    "CurvatureMemory": "nostalgia.projection.memory",
    "GGNOperator": "nostalgia.curvature.operators",
    "GradientProjector": "nostalgia.projection.projector",
    "HessianOperator": "nostalgia.curvature.operators",
    "KroneckerMemory": "nostalgia.projection.kronecker_memory",
    "kronecker_factors": "nostalgia.curvature.kronecker",
    "lanczos": "nostalgia.linalg.lanczos",
}


def __getattr__(name: str) -> Any:
    """The library's pieces, imported when asked for: the command line's help should not wait for them."""
    if name not in _HOME:
        raise AttributeError(f"module 'nostalgia' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
