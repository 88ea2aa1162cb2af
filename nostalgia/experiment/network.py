"""The backbone that the configuration names, with its adapters, and the vector space of what methods protect in it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from nostalgia.config.schema import Config
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models import Backbone, attach_lora, build_backbone
from nostalgia.models.dropout import by_sample
from nostalgia.parallel.accelerator import strategy


def make_backbone(config: Config, download: bool = True) -> Backbone:
    model = config.model
    backbone = build_backbone(
        framework=model.framework,
        model_id=model.model_id,
        arch=model.arch,
        pretrained=model.pretrained,
        config=model.config,
        image_size=config.dataset.image_size,
        seed=config.experiment.seed,
        download=download,
    )
    if model.use_lora:
        lora = model.lora
        attach_lora(
            backbone,
            r=lora.r,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            seed=config.experiment.seed,
        )
        if lora.freeze_a:
            for name, parameter in backbone.named_parameters():
                if ".lora_A." in name:
                    parameter.requires_grad_(False)
    backbone.dropout = by_sample(backbone)
    return backbone


def make_space(scope: dict[str, nn.Parameter], accelerator: Accelerator, dtype: torch.dtype) -> VectorSpace:
    """The vector space of the parameters in scope, spread as training will spread them."""
    if strategy(accelerator) == "fsdp2":
        shapes = [p.shape for p in scope.values()]
        return VectorSpace(list(scope), shapes, "sharded", dtype=dtype, device=accelerator.device)
    return VectorSpace.of(scope, dtype=dtype, device=accelerator.device)
