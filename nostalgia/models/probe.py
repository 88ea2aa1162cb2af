"""What a network does with its inputs, found by one forward pass on the ``meta`` device: shapes without
arithmetic.

The module itself is not touched, nor what it caches: a structural copy on ``meta`` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from nostalgia.parallel.modules import normalise_alone, skeleton

LAYERS = (nn.Linear, nn.Conv2d)

#: What libraries raise when a network cannot take an input of this shape.
SHAPE_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)


@dataclass(frozen=True)
class Probe:
    """One forward pass: what came out, and which linear and convolution layers were called, in order."""

    output: Any
    called: tuple[str, ...]
    parameters: dict[str, Tensor]  # the meta stand-ins, by name
    random: bool  # whether it drew random numbers: dropout, stochastic depth, noise

    def unused(self, features: Tensor) -> set[str]:
        """Names of the parameters on which ``features`` (meta, with a graph) does not depend.

        Read off the graph: only what an accumulation node stands for would ever get a gradient.
        """
        reached: set[int] = set()
        seen: set[Any] = set()
        nodes = [features.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                reached.add(id(node.variable))
            nodes.extend(following for following, _ in node.next_functions)
        return {name for name, value in self.parameters.items() if id(value) not in reached}


def probe(
    module: nn.Module,
    run: Callable[[Callable[..., Any], Tensor], Any],
    image_size: int,
    *,
    count: int = 2,
    training: bool = False,
) -> Probe:
    """Run ``module`` in evaluation mode, or in training mode, on meta images (count, 3, image_size, image_size).

    ``run(call, images)`` calls ``call`` as it would call the module.

    Raises one of ``SHAPE_ERRORS`` where the network cannot take such images.
    """
    module = skeleton(module)
    for layer in module.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            normalise_alone(layer)
    parameters: dict[str, Tensor] = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.is_floating_point())
        for name, value in module.named_parameters()
    }
    buffers = {name: torch.empty_like(value, device="meta") for name, value in module.named_buffers()}
    dtype = next((value.dtype for value in parameters.values()), torch.float32)
    images = torch.empty(count, 3, image_size, image_size, device="meta", dtype=dtype)
    called: list[str] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, {**parameters, **buffers}, args, kwargs)

    module.train(training)
    draws = _Draws()
    with _recording(module, called), torch.enable_grad(), draws:
        output = run(call, images)
    return Probe(output, tuple(dict.fromkeys(called)), parameters, draws.seen)


class _Draws(TorchDispatchMode):
    """Sees whether any operation draws from torch's random generators."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@contextmanager
def _recording(module: nn.Module, called: list[str]) -> Iterator[None]:
    """Note the names of linear and convolution layers as they are called.

    Some networks read a layer's weight without calling it; an adapter around such a layer would do nothing.
    """
    handles = [
        child.register_forward_pre_hook(lambda _module, _args, name=name: called.append(name))
        for name, child in module.named_modules()
        if isinstance(child, LAYERS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
