"""What a curvature product changes for its duration, and puts back whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nostalgia.errors import UsageError
from nostalgia.linalg.precision import FLOAT32_FLAGS, set_float32_products

PRECISIONS = ("float32", "float64", "tf32", "bf16")
TWICE_DIFFERENTIABLE = ("eager", "sdpa")  # of transformers' attention implementations


def value_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters and inputs in a product: float64 for ``float64``, else ``dtype``, float32 at least."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
    return torch.float64 if precision == "float64" else torch.promote_types(dtype, torch.float32)


@contextmanager
def product_context(precision: str, device: torch.device) -> Iterator[None]:
    """Random state kept, matrix products in ``precision``, attention in the kernel with a second derivative."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Training's own autocast must not reach in: products have a precision of their own.
        stack.enter_context(
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        )
        stack.enter_context(float32_products(tf32=precision == "tf32"))
        yield


def fix_randomness(seed: int, device: torch.device) -> None:
    """Let a loss that draws random numbers draw the same ones in every product: it stays one fixed function."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def use_twice_differentiable_attention(model: nn.Module) -> None:
    """Switch modules of transformers from fused attention without a second derivative to ``sdpa``.

    Gives each module of ``model`` (a skeleton) that has such a configuration a copy of it; what the
    configuration was shared with keeps the original.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        implementation = getattr(config, "_attn_implementation", None)
        if implementation is None or implementation in TWICE_DIFFERENTIABLE:
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._attn_implementation = "sdpa"
        module.__dict__["config"] = copies[id(config)]


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """float32 matrix products and convolutions in TF32 where the hardware has it, or not at all.

    torch has two spellings of these flags and raises when one is read that disagrees with the other (Inductor
    reads the older), so both are set, and both put back.
    """
    saved = [_own_value(flag) for flag in FLOAT32_FLAGS]
    matmul, cudnn = _older_matmul(), _older_cudnn()
    set_float32_products(tf32=tf32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        for flag, value in zip(FLOAT32_FLAGS, saved, strict=True):
            flag.fp32_precision = value


def _own_value(flag: Any) -> str:
    """A flag's own setting: ``none`` where it only follows a wider one. Leaves it as it was."""
    value = flag.fp32_precision
    flag.fp32_precision = "none"
    inherited = flag.fp32_precision
    flag.fp32_precision = value
    if value != inherited:
        return value
    flag.fp32_precision = "none"
    return "none"


def _older_matmul() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # raised for one disagreement only: TF32 allowed by the newer flag alone
        return "highest"


def _older_cudnn() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the spellings disagree: the older says what the newer does not
        return torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]
