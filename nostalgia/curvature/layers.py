"""Inputs and output gradients of a network's layers: what curvature by layers is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.curvature.network import Network
from nostalgia.models.adapters import is_adapted


@dataclass
class Layer:
    """A linear or convolution layer whose weight, or whose adapter, is in scope."""

    name: str  # of the module
    module: nn.Module  # of the network's skeleton
    base: nn.Module  # the linear or convolution layer itself
    parameters: tuple[str, ...]  # in scope: the weight, or the adapter's A and B
    scaling: float | None = None  # s of W + s B A; None: the weight itself


@dataclass
class Pass:
    """One forward pass: each layer's input and output, for as many backward passes as wanted."""

    outputs: Tensor  # (B, C) of the network
    targets: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    layer_outputs: dict[str, Tensor] = field(default_factory=dict)


def find_layers(network: Network) -> tuple[list[Layer], list[str]]:
    """The layers that hold parameters in scope, and the names of parameters that no such layer holds.

    By their kind alone: `sample_gradients.layers_by_formula` says which of them are used as such a layer is.
    """
    modules = dict(network.model.named_modules())
    layers: dict[str, Layer] = {}
    rest = []
    for name in network.names:
        owner, _, attribute = name.rpartition(".")
        adapted, mark, _ = name.partition(".lora_A." if ".lora_A." in name else ".lora_B.")
        module: Any = modules[adapted if mark else owner]
        base = module.get_base_layer() if is_adapted(module) else module
        if not has_rows(base) or attribute != "weight":
            rest.append(name)
        elif mark:
            known = layers.setdefault(adapted, Layer(adapted, module, base, (), float(module.scaling["default"])))
            known.parameters = tuple(sorted((*known.parameters, name)))  # A before B, in whatever order they are given
        else:
            layers[owner] = Layer(owner, module, base, (name,))
    return list(layers.values()), rest


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    """While it lasts, inputs and outputs of ``modules`` are kept from each forward pass; yields how to take them."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, arguments: Any, keywords: Any, output: Tensor) -> None:
            given = arguments[0] if arguments else next(iter(keywords.values()))
            inputs[name], outputs[name] = given.detach(), output

        return note

    def take() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        taken = dict(inputs), dict(outputs)
        inputs.clear()
        outputs.clear()
        return taken

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(passed: Pass, cotangent: Tensor, names: Iterable[str], retain: bool) -> dict[str, Tensor]:
    """Gradients of cotangent . outputs in the outputs of layers; zero for a layer that does not reach them."""
    wanted = [name for name in names if passed.layer_outputs[name].requires_grad]
    if not wanted:
        return {}
    found = torch.autograd.grad(
        passed.outputs,
        [passed.layer_outputs[name] for name in wanted],
        cotangent,
        retain_graph=retain,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, found, strict=True))


def input_rows(layer: nn.Module, x: Tensor, samples: int) -> Tensor:
    """Inputs of ``samples`` images as (B, T, i): tokens of a linear layer, also in windows; patches of a convolution."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        if isinstance(padding, str):
            x, padding = F.pad(x, _pads(layer)), 0
        return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
    return x.reshape(samples, -1, x.shape[-1])


def output_rows(layer: nn.Module, g: Tensor, samples: int) -> Tensor:
    """Output gradients as (B, T, o)."""
    if isinstance(layer, nn.Conv2d):
        return g.flatten(2).transpose(1, 2)
    return g.reshape(samples, -1, g.shape[-1])


def num_vectors(layer: nn.Module, x: Tensor) -> int:
    """How many vectors a linear layer's inputs are; of a convolution how many images."""
    return len(x) if isinstance(layer, nn.Conv2d) else x.numel() // x.shape[-1]


def has_rows(layer: nn.Module) -> bool:
    """Whether `input_rows` and `output_rows` are those of the layer: linear, or a plain convolution of one group."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def _pads(layer: nn.Conv2d) -> list[int]:
    """``padding`` "same" or "valid" as numbers, from the last dimension on; of an odd sum the more at the end (torch's)."""
    pads: list[int] = []
    for size, dilation in zip(reversed(layer.kernel_size), reversed(layer.dilation), strict=True):
        total = dilation * (size - 1) if layer.padding == "same" else 0
        pads += [total // 2, total - total // 2]
    return pads


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, in its own shape."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
