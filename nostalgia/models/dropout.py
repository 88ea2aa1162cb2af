"""Dropout by sample: a mask is a function of (seed, step, sample, layer, element), whatever rank or micro-batch it falls in.

torch's dropout draws from the process's generator, so that two ranks drop other elements than one process does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LAST = 0x846CA68B - (1 << 32)  # the second factor of the hash, as int32


@dataclass
class DropoutKeys:
    """What decides the masks of a network's present forward pass, and of its recomputation in the backward one."""

    samples: Tensor | None = None  # (B,) int32, a key for each sample; None: torch's generator decides
    layers: int = 0  # whose masks they decide
    elements: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)  # hashed counters, by their number
    _hashed: tuple[Tensor | None, Tensor, Tensor] | None = None  # samples, offsets and factors (layers, B, 1)

    def of(self, count: int, device: torch.device) -> Tensor:
        """(count,) int32: one number for each element of a sample."""
        if (count, device) not in self.elements:
            self.elements[count, device] = _mix_(torch.arange(count, dtype=torch.int32, device=device))
        return self.elements[count, device]

    def hashes(self, layer: int) -> tuple[Tensor, Tensor]:
        """Offsets and odd factors (B, 1) int32 of a layer's hash, made for all layers at once: few launches on a GPU."""
        if self._hashed is None or self._hashed[0] is not self.samples or layer >= len(self._hashed[1]):
            assert self.samples is not None
            numbers = torch.arange(self.layers, dtype=torch.int32, device=self.samples.device)
            offsets = _mix_(self.samples ^ numbers[:, None])[..., None]
            self._hashed = self.samples, offsets, _mix_(offsets + 1) | 1
        return self._hashed[1][layer], self._hashed[2][layer]


class SampleDropout(nn.Dropout):
    """`torch.nn.Dropout` whose mask for a sample depends on its key and on the layer's number alone.

    The first dimension of an input holds the samples, or an equal number of consecutive rows of each (windows). Any other
    input, and one given while there are no keys, is dropped by torch's generator.
    """

    def __init__(self, p: float, layer: int, keys: DropoutKeys) -> None:
        super().__init__(p)
        self.layer, self.keys = layer, keys
        keys.layers = max(keys.layers, layer + 1)

    def forward(self, input: Tensor) -> Tensor:
        samples = self.keys.samples
        if not self.training or not 0 < self.p < 1:
            return super().forward(input)
        if samples is None or input.dim() == 0 or len(input) % len(samples):
            return F.dropout(input, self.p, training=True)
        elements = self.keys.of(input.numel() // len(samples), input.device)
        offset, factor = self.keys.hashes(self.layer)
        # Multiply-add hashing (Dietzfelbinger et al. 1997) of the hashed elements, in wrapping int32: uniform, in one pass.
        hashed = torch.addcmul(offset, elements, factor)  # (B, elements of a sample)
        dropped = (hashed < round(self.p * 2**32) - 2**31).view(input.shape)
        return (input * (1 / (1 - self.p))).masked_fill(dropped, 0.0)


def by_sample(model: nn.Module) -> DropoutKeys:
    """Put `SampleDropout` in the place of each `torch.nn.Dropout` within ``model``; returns the keys they share.

    Dropout inside an operation (attention's, fused) and stochastic depth stay with torch's generator.
    """
    keys = DropoutKeys()
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Dropout]
    for layer, (name, module) in enumerate(found):
        parent, _, last = name.rpartition(".")
        own = SampleDropout(module.p, layer, keys).train(module.training)
        setattr(model.get_submodule(parent), last, own)
    return keys


def _mix_(x: Tensor) -> Tensor:
    """A 32-bit finaliser (lowbias32, C. Wellons) in wrapping int32, in place; the masks make its shifts logical."""
    for shift, factor in ((16, 0x7FEB352D), (15, _LAST), (16, 1)):
        x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        if factor != 1:
            x *= factor
    return x
