"""Gradients of single samples: by a layer's own formula, sum_t g_t x_t^T, where that is its gradient, else by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.batches import num_rows, rows_of
from nostalgia.curvature.layers import (
    Layer,
    Pass,
    find_layers,
    input_rows,
    num_vectors,
    output_gradients,
    output_rows,
    recorded,
)
from nostalgia.curvature.network import Network

# Of a layer's gradient by its own formula from autograd's, relative: far above rounding, far below another formula.
AGREE = {torch.float64: 1e-8, torch.float32: 1e-2}


def layers_by_formula(network: Network, batch: Any, precision: str, *, each_sample: bool) -> list[Layer]:
    """The layers in scope whose gradient is made of their inputs and output gradients: tried on two samples of ``batch``.

    Not so: weights that are used twice, changed by their layer before use, or read without its forward, and layers whose
    inputs are not of the samples (a table of positions). ``each_sample``: the formula must give each sample's gradient,
    else the sum over both, as it does where a layer's first dimension is not that of the samples.
    """
    layers, _ = find_layers(network)
    modules = {layer.name: layer.module for layer in layers}
    passes = []
    for count in sorted({1, min(2, num_rows(batch))}):
        with recorded(modules) as take, torch.enable_grad():
            outputs, targets = network(network.theta, rows_of(batch, 0, count))
        passes.append(Pass(outputs, targets, *take()))
    passed, alone = passes[-1], passes[0]
    called = [layer for layer in layers if layer.name in passed.inputs]
    vectors = [{layer.name: num_vectors(layer.base, p.inputs[layer.name]) for layer in called} for p in (alone, passed)]
    samples = len(passed.outputs)
    layers = [layer for layer in called if vectors[1][layer.name] == samples * vectors[0][layer.name]]
    u = torch.randn(passed.outputs.shape, generator=torch.Generator().manual_seed(0)).to(passed.outputs)
    names = [name for layer in layers for name in layer.parameters]
    ours = layer_gradients(network, passed, u, layers, retain=False)
    theirs = autograd_gradients(network, rows_of(batch, 0, samples), u, names)
    tolerance = 0.1 if precision in ("bf16", "tf32") else AGREE[network.dtype]
    # Where a gradient is zero but for rounding (attention that is uniform), rounding is not held against the layer.
    rounding = 100 * torch.finfo(network.dtype).eps * max((float(g.norm()) for g in theirs.values()), default=0.0)

    def agrees(name: str) -> bool:
        mine, other = ours[name], theirs[name]
        difference = mine - other if each_sample else (mine - other).sum(dim=0)
        return float(difference.norm()) <= max(tolerance * float(other.norm()), rounding)

    return [layer for layer in layers if all(agrees(name) for name in layer.parameters)]


def layer_gradients(network: Network, passed: Pass, u: Tensor, layers: list[Layer], retain: bool) -> dict[str, Tensor]:
    """Gradients (B, numel) of each sample in the layers' parameters, from inputs x and output gradients g: sum_t g x^T."""
    theta = dict(zip(network.names, network.theta, strict=True))
    found = output_gradients(passed, u, (layer.name for layer in layers), retain)
    rows: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        return (theta[name].detach() if name in theta else network.constant(name)).flatten(1)

    for layer in layers:
        if layer.name not in found:
            rows.update({name: theta[name].new_zeros(len(u), theta[name].numel()) for name in layer.parameters})
            continue
        x = input_rows(layer.base, passed.inputs[layer.name], len(u)).to(network.dtype)  # (B, T, i)
        g = output_rows(layer.base, found[layer.name], len(u)).to(network.dtype)  # (B, T, o)
        if layer.scaling is None:
            rows[layer.parameters[0]] = (g.mT @ x).flatten(1)
            continue
        for name in layer.parameters:
            if ".lora_A." in name:
                b = value(name.replace(".lora_A.", ".lora_B."))
                rows[name] = (layer.scaling * (g @ b).mT @ x).flatten(1)
            else:
                a = value(name.replace(".lora_B.", ".lora_A."))
                rows[name] = (layer.scaling * g.mT @ (x @ a.T)).flatten(1)
    return rows


def autograd_gradients(network: Network, batch: Any, u: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The same for any parameters, by a forward and a backward pass of each sample."""
    theta = dict(zip(network.names, network.theta, strict=True))
    rows = {name: theta[name].new_empty(len(u), theta[name].numel()) for name in names}
    for number in range(len(u)) if names else ():
        with torch.enable_grad():
            outputs, _ = network(network.theta, rows_of(batch, number, number + 1))
        found = torch.autograd.grad(
            outputs,
            [theta[name] for name in names],
            u[number : number + 1],
            allow_unused=True,
            materialize_grads=True,
        )
        for name, gradient in zip(names, found, strict=True):
            rows[name][number] = gradient.flatten()
    return rows
