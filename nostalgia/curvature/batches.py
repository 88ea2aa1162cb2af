"""Moves the user's batches, which are opaque otherwise, to where a product is computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """``batch`` with its tensors on ``device``, floating ones in ``dtype`` if given; the original is untouched.

    Looks into lists, tuples, named tuples, mappings and dataclasses; whatever else is handed on as it is.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_tensors(batch, move)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)  # keeps the class: BatchEncoding, defaultdict, ModelOutput
        for key, item in value.items():
            mapping[key] = map_tensors(item, change)
        return mapping
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):  # past __init__ and frozen: only the tensors change
            object.__setattr__(result, field.name, map_tensors(getattr(value, field.name), change))
        return result
    return value


def num_rows(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    return len(tensors_of(batch)[0])


def rows_of(batch: Any, start: int, stop: int) -> Any:
    """The batch of samples ``start`` to ``stop`` (excluded): these rows of each of its tensors."""
    return map_tensors(batch, lambda t: t[start:stop])


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order in which `map_tensors` changes them."""
    found: list[Tensor] = []
    if isinstance(batch, Tensor):
        return [batch]
    items = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, (list, tuple))
        else vars(batch).values()
    )
    for item in items:
        if isinstance(item, (Tensor, Mapping, list, tuple)):
            found += tensors_of(item)
    return found
