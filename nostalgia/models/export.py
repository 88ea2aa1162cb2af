"""Leaves a finished run's model in forms that other tools open, with a card that says what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nostalgia.models.adapters import merged, without_adapters
from nostalgia.models.backbone import Backbone
from nostalgia.models.heads import save_heads
from nostalgia.models.hub import quiet
from nostalgia.models.image_processor import FILE, Preparation, processor_settings
from nostalgia.models.model_card import TaskCard, code, model_card
from nostalgia.models.norm_statistics import save_statistics

if TYPE_CHECKING:
    from peft import LoraConfig

TORCHVISION_FILE = "model.safetensors"


def export(
    folder: Path,
    *,
    backbone: Backbone,
    heads: Mapping[str, nn.Linear],
    tasks: Sequence[TaskCard],
    command: str,
    method: str,
    model_id: str | None = None,
    norm_statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write ``folder``, whole or not at all, in place of one that is there. One rank calls it.

    ``backbone`` and ``heads`` hold whole tensors (of FSDP's shards, a gathered copy); ``norm_statistics`` are
    the batch-norm statistics by task, ``model_id`` the weights that the adapters were trained on. Contents:

    - ``backbone/``: ``save_pretrained`` and the image processor's settings, or torchvision's state dict in
      safetensors (without classifier). With adapters this is the network without them;
    - ``adapters/`` (LoRA): a PEFT folder: ``PeftModel.from_pretrained(backbone, "adapters")``;
    - ``backbone_merged/`` (LoRA): both in one, for tools that do not know adapters;
    - ``heads.safetensors``, ``classes.json``, ``norm_statistics.safetensors`` (``<task>/<buffer>``),
      ``transforms.json`` (of tasks with domain shifts), ``README.md``.
    """
    folder = Path(folder)
    partial = _aside(folder, "tmp")
    partial.mkdir(parents=True)
    try:
        files = _write(partial, backbone, heads, tasks, model_id, norm_statistics or {})
        card = model_card(
            title=" + ".join(task.name for task in tasks),
            source=backbone.source,
            tasks=tasks,
            command=command,
            method=method,
            usage=_usage(backbone),
            files=files,
            normalisation=_normalisation(backbone),
            shared_heads=len({id(head) for head in heads.values()}) < len(heads),
            tags=["lora", "peft"] if backbone.lora is not None else [],
            library="transformers" if backbone.framework == "hf" else None,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        _replace(partial, folder)
    except SafetensorError as error:  # the library's own name for a full disk
        raise OSError(f"{folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(
    folder: Path,
    backbone: Backbone,
    heads: Mapping[str, nn.Linear],
    tasks: Sequence[TaskCard],
    model_id: str | None,
    norm_statistics: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, str]:
    """Write all but the card; returns what the card says of each file."""
    files = {"backbone/": "the network without classifier"}
    if backbone.lora is None:
        _save_backbone(backbone, folder / "backbone")
    else:
        files["backbone/"] = "the network that the adapters belong to, without them"
        files["adapters/"] = "the LoRA adapters, as PEFT keeps them"
        files["backbone_merged/"] = "the network with the adapters added in: use it alone"
        _save_backbone(without_adapters(backbone), folder / "backbone")
        _save_adapters(backbone, backbone.lora, folder / "adapters", model_id)
        _save_backbone(merged(backbone), folder / "backbone_merged")
    save_heads(heads, folder / "heads.safetensors")
    files["heads.safetensors"] = "`<task>.weight` (classes, features) and `<task>.bias` of every head"
    classes = {task.name: list(task.classes) for task in tasks}
    (folder / "classes.json").write_text(json.dumps(classes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if any(task.transform for task in tasks):
        transforms = {task.name: list(task.transform) for task in tasks}
        (folder / "transforms.json").write_text(json.dumps(transforms, indent=2) + "\n", encoding="utf-8")
        files["transforms.json"] = "what was done to a task's images, training and validation, in this order"
    files["classes.json"] = "class names by task, in the order of the head's outputs"
    if norm_statistics:
        # By the names of the network in backbone/, which is one down from the run's own.
        own = {t: {name.removeprefix("model."): b for name, b in s.items()} for t, s in norm_statistics.items()}
        save_statistics(own, folder / "norm_statistics.safetensors")
        files["norm_statistics.safetensors"] = (
            "batch-norm statistics by task, `<task>/<buffer>` of the network: before a task's head, put the task's in by "
            "`load_state_dict` with `strict=False`"
        )
    return files


def _save_backbone(backbone: Backbone, folder: Path) -> None:
    folder.mkdir()
    if backbone.framework == "hf":
        with quiet():
            backbone.model.save_pretrained(folder)  # type: ignore[operator]
        settings = processor_settings(Preparation(backbone.resizing, backbone.mean, backbone.std, backbone.bgr))
        (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    metadata = {
        "format": "pt",
        "arch": str(backbone.arch),
        "image_size": str(backbone.image_size),
        "resize_size": str(backbone.resizing.target),
        "interpolation": backbone.resizing.interpolation,
        "mean": ",".join(map(str, backbone.mean)),
        "std": ",".join(map(str, backbone.std)),
    }
    save_file(tensors, folder / TORCHVISION_FILE, metadata=metadata)


def _save_adapters(backbone: Backbone, adapters: LoraConfig, folder: Path, model_id: str | None) -> None:
    """The layout of PEFT's own ``save_pretrained``, for a network in which the adapters were put in place."""
    from peft import LoraConfig

    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(backbone.model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = adapters.to_dict() | {"base_model_name_or_path": model_id, "inference_mode": True}
    LoraConfig(**settings).save_pretrained(str(folder))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters of ``model``, by the names that PEFT gives them in a file."""
    from peft.tuners.lora import LoraLayer

    return {
        f"base_model.model.{name}".replace(".default", ""): tensor
        for name, tensor in model.state_dict().items()
        if any(f".{part}." in name for part in LoraLayer.adapter_layer_names)
    }


def _replace(partial: Path, folder: Path) -> None:
    """Move ``partial`` to ``folder``; what is there goes only once the new one can take its place."""
    old = _aside(folder, "old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path, end: str) -> Path:
    """A name beside ``folder`` that is free: what a process that was killed left there is removed."""
    path = folder.with_name(f".{folder.name}.{end}")
    shutil.rmtree(path, ignore_errors=True)
    return path


def _normalisation(backbone: Backbone) -> str:
    words = FEATURE_WORDS[backbone.features.__name__]
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
    return (
        f"Images of {backbone.image_size} x {backbone.image_size} pixels in [0, 1], normalised with mean "
        f"({mean}) and std ({std}). Features ({backbone.feature_dim}): {words}."
    )


FEATURE_WORDS = {
    "class_token": "`last_hidden_state[:, 0]`, the class token",
    "token_pair": "`last_hidden_state[:, :2].flatten(1)`, class and distillation token",
    "pooled": "`pooler_output.flatten(1)`",
    "mean_of_tokens": "the mean of `last_hidden_state` over positions",
    "flattened": "the output, flattened, of the network without its classifier",
}


def _usage(backbone: Backbone) -> str:
    alone = "backbone_merged" if backbone.lora is not None else "backbone"
    if backbone.framework == "torchvision":
        lines = [
            "from nostalgia.models import build_backbone, load_heads",
            f'backbone = build_backbone(framework="torchvision", model_id="{alone}/{TORCHVISION_FILE}")',
        ]
    else:
        extra = ", add_pooling_layer=False" if getattr(backbone.model, "pooler", 0) is None else ""
        lines = [
            "from transformers import AutoModel",
            f'backbone = AutoModel.from_pretrained("{alone}"{extra})',
        ]
        if backbone.lora is not None:
            lines += [
                "# or, with the adapters as such:",
                "from peft import PeftModel",
                f'base = AutoModel.from_pretrained("backbone"{extra})',
                'backbone = PeftModel.from_pretrained(base, "adapters")',
            ]
        if backbone.call:
            lines.append("# call it with " + ", ".join(f"{key}={value}" for key, value in backbone.call.items()))
    return code("\n".join(lines))
