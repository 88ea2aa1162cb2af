"""The network as a run left it in its ``export/``: its adapters in place and not added in.

Adding them in is the same function up to rounding; a run that is measured again must give the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nostalgia.errors import NotFoundError
from nostalgia.models.adapters import lend_attributes
from nostalgia.models.backbone import Backbone
from nostalgia.models.backbones import build_backbone
from nostalgia.models.export import TORCHVISION_FILE, adapter_tensors
from nostalgia.models.heads import load_heads
from nostalgia.models.norm_statistics import load_statistics
from nostalgia.utils.tensor_files import read_tensors


@dataclass(frozen=True)
class Exported:
    """``heads`` and ``norm_statistics`` are by task; the latter are empty where the run kept none of each task's own."""

    backbone: Backbone
    heads: dict[str, nn.Linear]
    norm_statistics: dict[str, dict[str, Tensor]]


def load_export(folder: Path, *, framework: str, config: Mapping[str, Any] | None = None) -> Exported:
    """What `export` wrote to ``folder``, the backbone in evaluation mode; ``config`` as it was built with.

    Raises NotFoundError for an export that is not there or not whole.
    """
    statistics, backbone = folder / "norm_statistics.safetensors", _backbone(folder, framework, config)
    return Exported(
        backbone,
        load_heads(folder / "heads.safetensors"),
        _of_backbone(load_statistics(statistics), backbone) if statistics.is_file() else {},
    )


def _of_backbone(statistics: Mapping[str, dict[str, Tensor]], backbone: Backbone) -> dict[str, dict[str, Tensor]]:
    """By the backbone's names: the file has those of the network in it."""
    own = dict(backbone.named_buffers())
    return {
        task: {name if name in own else f"model.{name}": tensor for name, tensor in values.items()}
        for task, values in statistics.items()
    }


def _backbone(folder: Path, framework: str, config: Mapping[str, Any] | None) -> Backbone:
    network = folder / "backbone"
    if not network.is_dir():
        raise NotFoundError(f"{folder}: no exported model; a run leaves it at its end (experiment.export=true)")
    if framework == "torchvision":
        file = str(network / TORCHVISION_FILE)
        backbone = build_backbone(framework=framework, model_id=file, config=config)
    else:  # its config.json says all that its configuration did
        backbone = build_backbone(framework=framework, model_id=str(network))
    if (folder / "adapters").is_dir():
        _attach(backbone, folder / "adapters")
    return backbone.eval()


def load_classes(folder: Path) -> dict[str, list[str]]:
    """Class names by task, in the order of the head's outputs."""
    file = folder / "classes.json"
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NotFoundError(f"{file}: cannot be read ({error}); is this the export of a finished run?") from None
    if not isinstance(classes, dict) or not all(map(_is_names, classes.values())):
        raise NotFoundError(f"{file}: no class names by task")
    return classes


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@torch.no_grad()
def _attach(backbone: Backbone, folder: Path) -> None:
    """Put the adapters of a PEFT folder in place."""
    from peft import LoraConfig, inject_adapter_in_model

    try:
        settings = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotFoundError(f"{folder}: adapters cannot be read ({error})") from None
    assert isinstance(settings, LoraConfig)
    tensors = read_tensors(folder / "adapter_model.safetensors", "adapters")
    inject_adapter_in_model(settings, backbone.model)
    lend_attributes(backbone.model)
    own = adapter_tensors(backbone.model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise NotFoundError(f"{folder}: adapters of another network: {len(odd)} names differ ({', '.join(odd[:3])})")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise NotFoundError(f"{folder}: adapters of another network: {name} has another shape")
        tensor.copy_(tensors[name])
    backbone.lora = settings
