"""Continual-learning methods: one class a file, one protocol (`base.Method`)."""

from nostalgia.data.exemplars import Exemplar, ExemplarLoader
from nostalgia.data.stream import Batch
from nostalgia.linalg.block import Block
from nostalgia.methods.base import Method, TaskContext
from nostalgia.methods.vectors import QuadraticPenalty
from nostalgia.models.objective import Objective, Output
from nostalgia.options import option
from nostalgia.parallel.tensors import placed_as

__all__ = [
    "Batch",
    "Block",
    "Exemplar",
    "ExemplarLoader",
    "Method",
    "Objective",
    "Output",
    "QuadraticPenalty",
    "TaskContext",
    "option",
    "placed_as",
]
