"""The user's function of whole parameters, apart from the model the parameters belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nostalgia.curvature.context import use_twice_differentiable_attention
from nostalgia.parallel.modules import named_parameters, skeleton, whole_state
from nostalgia.parallel.tensors import local

Values = tuple[Tensor, ...]


class Network:
    """``function(model, batch)`` at any values of the parameters ``names``, all else held constant.

    Works on a skeleton of ``model`` in evaluation mode: mode, ``requires_grad``, gradients and buffers of the
    model itself are never touched. The values taken from it (a gather under FSDP2, views where parameters are
    whole and of ``dtype``) stand until they are taken again.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[nn.Module, Any], Any],
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.names, self.device, self.dtype = tuple(names), device, dtype
        bones = skeleton(model)
        use_twice_differentiable_attention(bones)
        self._call = _Call(bones, function).eval()
        self.take(model)

    def take(self, model: nn.Module) -> None:
        """Take the model's present values; a collective under FSDP2."""
        self.theta: Values = ()  # frees the former values before the new ones are gathered
        self._constants: dict[str, Tensor] = {}
        self._stamp = _stamp(model)
        values = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in whole_state(model).items()
        }
        self.theta = tuple(values.pop(name).detach().requires_grad_() for name in self.names)
        self._constants = {f"model.{name}": value for name, value in values.items()}

    @property
    def model(self) -> nn.Module:
        """The skeleton that the function is called with: hooks may be put on its modules."""
        return self._call.model

    def constant(self, name: str) -> Tensor:
        """The whole value of a parameter or buffer that is not among ``names``."""
        return self._constants[f"model.{name}"]

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model's parameters are those taken: no optimizer step, no loading since."""
        return self._stamp == _stamp(model)

    def __call__(self, theta: Values, batch: Any) -> Any:
        """The function's value at the parameters ``theta``, in the order of ``names``."""
        scope = {f"model.{name}": value for name, value in zip(self.names, theta, strict=True)}
        return functional_call(self._call, {**self._constants, **scope}, (batch,))


class _Call(nn.Module):
    """Hands the skeleton to the user's function as an ordinary model, under `functional_call`."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


def _stamp(model: nn.Module) -> list[tuple[int, int]]:
    """Where each parameter lies and how often it was written to."""
    mine = (local(p) for p in named_parameters(model).values())
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in mine]
