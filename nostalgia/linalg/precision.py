"""What float32 products are computed in: by choice TF32 for a network, never for the linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FLOAT32_FLAGS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


def set_float32_products(*, tf32: bool) -> None:
    """Let float32 matrix products and convolutions of this process use TF32 where the hardware has it, or not at all.

    torch has two spellings of these flags, and raises when one is read that disagrees with the other or that stands
    for several which disagree (Inductor and ``cudnn.flags`` read the older): all are set, the older first.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for flag in FLOAT32_FLAGS:
        flag.fp32_precision = "tf32" if tf32 else "ieee"


@contextmanager
def full_precision_matmul(device_type: str = "cuda") -> Iterator[None]:
    """No TF32 or bfloat16 inside: not by the backends' flags (CUDA, oneDNN), not by autocast on the device.

    Reads and sets only torch's ``fp32_precision`` flags: their legacy spelling ``allow_tf32`` raises as
    soon as a process has used both.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    inherited = []
    for backend in backends:
        backend.fp32_precision = "none"
        inherited.append(backend.fp32_precision)
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        # A flag that only followed the global one is left following it.
        for backend, value, default in zip(backends, saved, inherited, strict=True):
            backend.fp32_precision = "none" if value == default else value
