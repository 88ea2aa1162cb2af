"""Batches of any shape move as a whole, and the original stays."""

from __future__ import annotations

from collections import defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutput

from nostalgia.curvature.batches import to_device

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Frozen:
    images: Tensor
    name: str = "a"
    derived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.images + 1)


def floats() -> Tensor:
    return torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "tensor_of"),
    [
        (floats(), lambda b: b),
        ([floats(), 1], lambda b: b[0]),
        ((floats(), "text"), lambda b: b[0]),
        (Pair(floats(), None), lambda b: b.x),
        ({"x": {"y": [floats()]}}, lambda b: b["x"]["y"][0]),
        (defaultdict(list, x=floats()), lambda b: b["x"]),
        (Frozen(floats()), lambda b: b.images),
        (Frozen(floats()), lambda b: b.derived),
        (BatchFeature({"x": floats()}), lambda b: b["x"]),
        (BaseModelOutput(last_hidden_state=floats()), lambda b: b.last_hidden_state),
    ],
)
def test_floating_tensors_are_cast_wherever_they_are(batch, tensor_of):
    moved = to_device(batch, CPU, torch.float64)
    assert type(moved) is type(batch)
    assert tensor_of(moved).dtype == torch.float64
    assert tensor_of(batch).dtype == torch.float32
    assert tensor_of(to_device(batch, CPU)).dtype == torch.float32


def test_labels_masks_and_other_things_stay():
    batch = {"labels": torch.arange(3), "mask": torch.ones(3, dtype=torch.bool), "names": ["a"], "n": 3}
    moved = to_device(batch, CPU, torch.float64)
    assert moved["labels"].dtype == torch.int64
    assert moved["mask"].dtype == torch.bool
    assert moved["names"] == ["a"]
    assert moved["n"] == 3
