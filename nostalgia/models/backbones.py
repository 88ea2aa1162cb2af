"""Makes the backbone that the configuration names, from transformers or torchvision, with or without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nostalgia.errors import UsageError
from nostalgia.models.backbone import Backbone

ADAPTER_MARK = "lora_"


def build_backbone(
    *,
    framework: str,
    model_id: str | None = None,
    arch: str | None = None,
    pretrained: bool = True,
    config: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    seed: int = 0,
    download: bool = True,
) -> Backbone:
    """Build the backbone that the words of ``model.*`` describe, on the CPU, in float32.

    ``framework`` is ``hf`` (``model_id``: hub id or folder; ``config``: settings of the architecture, with
    ``model_type`` for one from scratch) or ``torchvision`` (``arch``; ``model_id``: a file with a state dict,
    or the name of one of the architecture's weights; ``config``: arguments of its builder). ``image_size``
    None takes the size the weights were trained at. Random weights depend on ``seed`` alone; the global
    random state is untouched. Without ``download`` only what is on this machine is taken.

    Raises NotFoundError where wanted weights cannot be had (random ones never stand in for them), UsageError
    for words that cannot be right.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"dataset.image_size={image_size}: the side of an image is at least one pixel")
    if framework == "hf":
        if arch is not None:
            raise UsageError(f"model.arch={arch} goes with model.framework=torchvision; model.framework is hf")
        from nostalgia.models import huggingface

        return huggingface.build(model_id, pretrained, config or {}, image_size, seed, download)
    if framework == "torchvision":
        from nostalgia.models import torchvision_models

        return torchvision_models.build(arch, model_id, pretrained, config or {}, image_size, seed, download)
    raise UsageError(f"model.framework={framework}: hf and torchvision are allowed")


def has_adapters(backbone: nn.Module) -> bool:
    """Whether LoRA adapters are attached."""
    return any(ADAPTER_MARK in name for name, _ in backbone.named_parameters())


def scope_parameters(backbone: nn.Module, which: str = "auto") -> dict[str, nn.Parameter]:
    """The parameters that the method protects, by their name in ``backbone``, in the module's order.

    ``lora-only``: the adapters; ``backbone``: everything trainable in the backbone; ``auto``: the adapters
    where there are some, else the backbone. What ``Backbone.set_trainable(False)`` froze for a while still
    counts. Raises UsageError for ``lora-only`` without adapters and for a backbone in which nothing is
    trainable.
    """
    if which not in ("auto", "backbone", "lora-only"):
        raise UsageError(f"model.scope={which}: auto, backbone and lora-only are allowed")
    adapters = has_adapters(backbone)
    if which == "lora-only" and not adapters:
        raise UsageError(
            "model.scope=lora-only, but the backbone has no adapters: set model.use_lora=true, or model.scope=backbone"
        )
    only_adapters = which == "lora-only" or (which == "auto" and adapters)
    paused: frozenset[str] = getattr(backbone, "paused", frozenset())
    chosen = {
        name: parameter
        for name, parameter in backbone.named_parameters()
        if (parameter.requires_grad or name in paused) and (ADAPTER_MARK in name or not only_adapters)
    }
    if not chosen:
        raise UsageError("nothing in the backbone is trainable: there is nothing to train or to project")
    return chosen
