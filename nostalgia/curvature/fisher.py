"""Diagonal of the Fisher information matrix, from gradients of single samples.

    F_i = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2

with labels y_n sampled from the model (the Fisher matrix itself) or true ones (the empirical Fisher).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.base import parameters_in_scope
from nostalgia.curvature.context import product_context
from nostalgia.curvature.layers import Pass, find_layers, input_rows, output_gradients, output_rows, recorded, weight_of
from nostalgia.curvature.network import Network, Values
from nostalgia.data.stream import Batch
from nostalgia.data.transforms import uniform
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace

LABELS = ("sampled", "true")
NUMBERS = 1 << 27  # held at once: gradients of a few samples


@torch.no_grad()
def diagonal_fisher(
    model: nn.Module,
    forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    batches: Sequence[Batch],
    parameters: Mapping[str, nn.Parameter],
    space: VectorSpace,
    *,
    labels: str = "sampled",
    seed: int = 0,
) -> Tensor:
    """This rank's part (P_local,) in ``space`` of the diagonal, over the samples of all ranks.

    ``batches`` are this rank's share, possibly empty; ``forward_fn`` as for `GGNOperator`. A sampled label is a function
    of ``seed`` and the sample's index alone. Evaluation mode; two collectives, one of P numbers. Raises UsageError for
    other ``labels``, and without samples.
    """
    if labels not in LABELS:
        raise UsageError(f"labels={labels!r}: allowed are {', '.join(LABELS)}")
    scope = parameters_in_scope(model, parameters)
    first = next(iter(scope.values()))
    network = Network(model, forward_fn, tuple(scope), first.device, torch.promote_types(first.dtype, torch.float32))
    sums = [torch.zeros_like(t) for t in network.theta]
    count = 0
    with product_context("float32", first.device):
        for batch in batches:
            targets = _labels(network, batch, labels, seed)
            count += len(batch)
            for rows in torch.arange(len(batch)).split(max(1, NUMBERS // space.size)):
                squares = _squared_gradients(network, batch, targets, rows.to(first.device))
                torch._foreach_add_(sums, squares)
    total = space.all_reduce(torch.tensor([float(count)], dtype=torch.float64, device=space.device))
    if float(total) == 0:
        raise UsageError("the Fisher matrix is taken over no samples; give num_samples >= 1")
    return space.scatter(sums).div_(float(total))


def layer_fisher(
    model: nn.Module,
    forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    batches: Sequence[Batch],
    layers: Sequence[str],
    accelerator: Accelerator,
    *,
    labels: str = "sampled",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Diagonal Fisher matrices (o, i) of the weights of adapted ``layers``, named within ``model.backbone``.

    The gradient of a sample in a layer's weight is sum_tokens g x^T, from the layer's input x and output gradient g. The
    same on all ranks; one all-reduce. Arguments as for `diagonal_fisher`.
    """
    names = [n for n, _ in model.named_parameters() if n.startswith("backbone.") and ".lora_" in n]
    chosen = {f"backbone.{layer}": layer for layer in layers}
    names = [n for n in names if n.partition(".lora_")[0] in chosen]
    first = next(model.parameters())
    network = Network(model, forward_fn, names, first.device, torch.promote_types(first.dtype, torch.float32))
    found, _ = find_layers(network)
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=first.device)
    with product_context("float32", first.device), recorded({layer.name: layer.module for layer in found}) as take:
        for batch in batches:
            targets = _labels(network, batch, labels, seed)
            take()
            with torch.enable_grad():
                outputs, _ = network(network.theta, batch)
            inputs, layer_outputs = take()
            passed = Pass(outputs, targets, inputs, layer_outputs)
            slope = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype) - outputs.detach().softmax(dim=1)
            slopes = output_gradients(passed, slope, layer_outputs, retain=False)
            count += len(batch)
            for layer in found:
                g = output_rows(layer.base, slopes[layer.name], len(slope))
                x = input_rows(layer.base, inputs[layer.name], len(slope))
                square = torch.einsum("bto,bti->boi", g, x).square().sum(dim=0)
                sums[layer.name] = sums.get(layer.name, 0) + square
    for layer in found:
        if layer.name not in sums:  # an empty share
            shape = weight_of(layer.base).flatten(1).shape
            sums[layer.name] = torch.zeros(shape, dtype=network.dtype, device=first.device)
    count = accelerator.reduce(count, "sum")
    return {chosen[name]: accelerator.reduce(total, "sum") / float(count) for name, total in sums.items()}


def _labels(network: Network, batch: Batch, labels: str, seed: int) -> Tensor:
    logits, targets = network(network.theta, batch)
    if labels == "true":
        return targets
    draws = uniform(seed, 0, batch.indices, 1)  # (B, 1)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return (cumulative < draws).sum(dim=-1).clamp_max(logits.shape[-1] - 1)


def _squared_gradients(network: Network, batch: Batch, targets: Tensor, rows: Tensor) -> list[Tensor]:
    """Sums over ``rows`` of squared gradients of single samples, in parameter shape."""
    theta = tuple(t.detach() for t in network.theta)
    tasks = batch.tasks[:1]  # of one head, all of them

    def loss(values: Values, image: Tensor, target: Tensor) -> Tensor:
        one = Batch(image[None], target[None], image.new_ones(1), target[None], tasks)
        logits, _ = network(values, one)
        return F.cross_entropy(logits, target[None], reduction="sum")

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    gradients = per_sample(theta, batch.images[rows], targets[rows])
    return [g.square().sum(dim=0) for g in gradients]
