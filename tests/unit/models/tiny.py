"""Networks small enough that a test of one takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nostalgia.models import Backbone, build_backbone

_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
_DINO = {key: value for key, value in _TRANSFORMER.items() if key != "intermediate_size"}
_WINDOWS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "vit": _TRANSFORMER,
    "deit": _TRANSFORMER,
    "beit": _TRANSFORMER,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "convnext": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": 32},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def scratch(kind: str = "vit", seed: int = 0, image_size: int | None = None, **config: Any) -> Backbone:
    """A from-scratch Hugging Face backbone of ``kind``."""
    if kind == "resnet" and image_size is None:
        image_size = 32
    settings = {"model_type": kind, **CONFIGS[kind], **config}
    return build_backbone(framework="hf", pretrained=False, config=settings, image_size=image_size, seed=seed)


def resnet18(seed: int = 0) -> Backbone:
    """torchvision's ResNet-18 for 32 pixel images, from scratch."""
    return build_backbone(framework="torchvision", arch="resnet18", pretrained=False, image_size=32, seed=seed)


def images(backbone: Backbone, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Random images (batch, 3, H, W) of the backbone's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, backbone.image_size, backbone.image_size, generator=generator)


def shake(backbone: Backbone, seed: int = 0) -> None:
    """Move every trainable parameter off its initial value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class _MetaParameters(TorchFunctionMode):
    """Uninitialised tensors (that is, parameters) on ``meta``; what builders compute with stays real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks built within the block have parameters without values, however large they are."""
    with _MetaParameters():
        yield
