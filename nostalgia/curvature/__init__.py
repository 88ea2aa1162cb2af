"""Curvature of a loss over the parameters, as operators that are sharded over ranks."""

from nostalgia.curvature.operators import GGNOperator, HessianOperator

__all__ = ["GGNOperator", "HessianOperator"]
