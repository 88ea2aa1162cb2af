"""Sizes of the layers that have Kronecker factors, and what the penalty costs at one, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nostalgia.curvature.layers import has_rows
from nostalgia.models.adapters import adapted_weights
from nostalgia.models.backbone import Backbone


def layer_sides(backbone: Backbone, scope: dict[str, torch.Size]) -> list[tuple[int, int, int]]:
    """Outputs, inputs, and the rank of its change (0: whole) of each layer with Kronecker factors."""
    found = []
    ranks = {name.partition(".lora_B.")[0]: shape[1] for name, shape in scope.items() if ".lora_B." in name}
    for name, weight in adapted_weights(backbone).items():
        rank = ranks.get(name.removesuffix(".weight"))
        if rank is not None:
            found.append((*_matrix(weight.shape), int(rank)))
    owners = dict(backbone.named_modules())
    for name, shape in scope.items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and ".lora_" not in name and has_rows(owners[owner]):
            found.append((*_matrix(shape), 0))
    return found


def penalty_flops(outputs: int, inputs: int, rank: int) -> float:
    """Of one term of the penalty's gradient at one layer."""
    if rank:
        return 2.0 * (2 * rank) * (outputs**2 + inputs**2)  # G L and R A, with L (o, 2r) and R (2r, i)
    return 2.0 * outputs * inputs * (outputs + inputs)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return int(shape[0]), math.prod(shape[1:])
