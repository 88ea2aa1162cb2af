"""Adapted layers of one shape, whose penalties' gradients are computed together.

A GPU spends more on launching the dozen small products of a layer than on computing them: 48 adapters of a ViT-B are one
dozen products as a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nostalgia.models.adapters import add_gradient
from nostalgia.parallel.tensors import gathered


@dataclass
class LayerTerms:
    """The terms of one layer, one a task or one for all; ``parameters`` and ``scaling`` as in `LayerFactors`."""

    inputs: Tensor  # (terms, i, i)
    outputs: Tensor  # (terms, o, o)
    parameters: tuple[str, ...]
    scaling: float | None

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.inputs, self.outputs))


@dataclass
class AdapterGroup:
    """L layers of one shape: sum_t G_lt D_l A_lt for each, D_l = s_l (B_l A_l - B*_l A*_l), in its factors B and A."""

    layers: Sequence[LayerTerms]
    inputs: Tensor  # (L, terms, i, i)
    outputs: Tensor  # (L, terms, o, o)
    squared_scalings: Tensor  # (L, 1, 1, 1)
    a0: Tensor  # (L, r, i), the reference point
    b0: Tensor  # (L, o, r)

    def add_gradients(self, parameters: Mapping[str, nn.Parameter], strength: float) -> None:
        """Add ``strength`` times the gradients to those of ``parameters``; 4 d^2 r a layer and term."""
        a, b = stacked(self.layers, parameters)
        left, right = torch.cat([b, -self.b0], dim=2)[:, None], torch.cat([a, self.a0], dim=1)[:, None]
        weighted = strength * self.squared_scalings * (self.outputs @ left)  # (L, terms, o, 2r)
        through = right @ self.inputs  # (L, terms, 2r, i)
        of_a = ((b.mT[:, None] @ weighted) @ through).sum(dim=1)
        of_b = (weighted @ (through @ a.mT[:, None])).sum(dim=1)
        for layer, *changes in zip(self.layers, of_a, of_b, strict=True):
            for name, change in zip(layer.parameters, changes, strict=True):
                if parameters[name].requires_grad:
                    add_gradient(parameters[name], change.view(parameters[name].shape))


def adapter_groups(layers: Sequence[LayerTerms], reference: Mapping[str, Tensor]) -> list[AdapterGroup]:
    """The adapted ones of ``layers`` by shape; their terms become views of the groups', so that nothing is kept twice."""
    by_shape: dict[tuple[torch.Size, ...], list[LayerTerms]] = defaultdict(list)
    for layer in layers:
        if layer.scaling is not None:
            by_shape[layer.inputs.shape, layer.outputs.shape, reference[layer.parameters[0]].shape].append(layer)
    groups = []
    for members in by_shape.values():
        inputs, outputs = (torch.stack([getattr(m, side) for m in members]) for side in ("inputs", "outputs"))
        for number, member in enumerate(members):
            member.inputs, member.outputs = inputs[number], outputs[number]
        scalings = inputs.new_tensor([m.scaling or 0.0 for m in members])
        groups.append(
            AdapterGroup(members, inputs, outputs, scalings.square()[:, None, None, None], *stacked(members, reference))
        )
    return groups


def stacked(layers: Sequence[LayerTerms], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (L, r, i) and B (L, o, r) of ``layers``; one all-gather where they are shards."""
    whole = gathered([tensors[layer.parameters[side]] for side in (0, 1) for layer in layers])
    a, b = (
        torch.stack([matrix.flatten(1) for matrix in side]) for side in (whole[: len(layers)], whole[len(layers) :])
    )
    return a, b


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
