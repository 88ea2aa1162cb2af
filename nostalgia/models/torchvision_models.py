"""Classification networks of torchvision, every one by name, with their classifier taken off.

torchvision's own weights, a downloaded file and a state dict saved here go the same way: the network is built
bare, its tensors are loaded by name, and one that is missing is an error.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.transforms import InterpolationMode

from nostalgia.data.resizing import Resizing
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models.backbone import Backbone, flattened
from nostalgia.models.seeding import seeded
from nostalgia.options import nearest

HALF = (0.5, 0.5, 0.5)
Triple = tuple[float, float, float]

#: Auxiliary classifiers, which only help to train from scratch and are no part of the features.
AUXILIARY = ("aux1", "aux2", "AuxLogits")
#: Networks that torchvision ports from TensorFlow: made for mean and std 0.5, which a switch in them imitates
#: from ImageNet's. Without the switch and with 0.5 given to the pipeline, the network sees exactly the same.
FROM_TENSORFLOW = ("googlenet", "inception_v3")


def architectures() -> list[str]:
    """Names of all torchvision classification networks."""
    return list_models(module=torchvision.models)


def build(
    arch: str | None,
    model_id: str | None,
    pretrained: bool,
    config: Mapping[str, Any],
    image_size: int | None,
    seed: int,
    download: bool = True,
) -> Backbone:
    """Backbone ``arch``, its weights from ``model_id`` (a file, or a name such as IMAGENET1K_V2) or the
    current ones.

    Raises NotFoundError for weights that cannot be had or do not fit, UsageError for an unknown architecture.
    """
    file = _file(model_id) if pretrained else None
    stored = _metadata(file) if file is not None else {}
    arch = arch or stored.get("arch")
    if arch not in architectures():
        hint = nearest(str(arch), architectures()) or f"; known are {', '.join(architectures())}"
        raise UsageError(f"model.arch={arch} is not a classification network of torchvision{hint}")
    weights = _weights(arch, model_id if pretrained and file is None else None)
    transform = weights.transforms()
    resizing = Resizing(int(stored.get("image_size", transform.crop_size[0])))
    if stored:
        how = InterpolationMode(stored.get("interpolation", "bilinear")).value
        resizing = replace(resizing, edge=int(stored.get("resize_size", 0)), interpolation=how)
    elif pretrained:
        resizing = replace(resizing, edge=transform.resize_size[0], interpolation=transform.interpolation.value)
    if image_size is not None:
        resizing = resizing.at(image_size)
    size = resizing.size
    with seeded(seed):
        model, classifier = bare(arch, config, size)
    mean, std = HALF, HALF
    if pretrained:
        _load(model, classifier, arch, file, weights, size, download)
        if arch not in FROM_TENSORFLOW:
            mean, std = _triple(stored.get("mean", transform.mean)), _triple(stored.get("std", transform.std))
    source = f"torchvision {arch}" + ("" if pretrained else " (random weights)")
    return Backbone(
        model,
        flattened,
        resizing=resizing,
        mean=mean,
        std=std,
        framework="torchvision",
        source=source,
        arch=arch,
    )


def bare(arch: str, config: Mapping[str, Any], image_size: int) -> tuple[nn.Module, str]:
    """The network with random weights and no classifier, and the name that the classifier had."""
    if "num_classes" in config or "weights" in config:
        raise UsageError("model.config takes neither num_classes nor weights: heads belong to the tasks")
    arguments: dict[str, Any] = dict(config)
    if arch in FROM_TENSORFLOW:
        arguments |= {"aux_logits": False, "transform_input": False, "init_weights": True}
    if arch.startswith("vit_"):
        arguments["image_size"] = image_size
    if arch.startswith("maxvit"):
        arguments["input_size"] = (image_size, image_size)
    try:
        model = get_model(arch, weights=None, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = f" and model.config={dict(config)}" if config else ""
        raise UsageError(
            f"torchvision {arch} cannot be built for dataset.image_size={image_size}{given}: {error}"
        ) from error
    # The last layer as defined: linear everywhere but in SqueezeNet, whose classifier is a 1 x 1 convolution.
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    name = layers[-1]
    assert model.get_submodule(name).weight.shape[0] == 1000, f"{arch}: {name} is no classifier"
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    return model, name


# Weights ----------------------------------------------------------------------------------------------------


def _file(model_id: str | None) -> Path | None:
    """``model_id`` as a file of weights, or None where it names none; raises NotFoundError for one that is
    not there."""
    if model_id is None:
        return None
    path = Path(model_id).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(f"model.model_id={model_id} is a folder: model.framework=torchvision wants a file of weights")
    if "/" in model_id or path.suffix:
        raise NotFoundError(
            f"model.model_id={model_id}: there is no such file of weights ({path.absolute()}); with "
            "model.framework=torchvision give a .pth or .safetensors file, or null for the current weights"
        )
    return None


def _weights(arch: str, name: str | None) -> WeightsEnum:
    known = get_model_weights(arch)
    if name is None:
        return known.DEFAULT
    if name not in known.__members__:
        raise UsageError(
            f"model.model_id={name} is neither a file nor a name of weights of {arch}: {', '.join(known.__members__)}"
        )
    return known[name]


def _load(
    model: nn.Module,
    classifier: str,
    arch: str,
    file: Path | None,
    weights: WeightsEnum,
    image_size: int,
    download: bool,
) -> None:
    """Fill ``model`` from ``file``, else from ``weights``; every tensor must be there and fit."""
    source = f"model.model_id={file}" if file is not None else f"weights of {arch}"
    state = _read(file, source) if file is not None else _download(arch, weights, download)
    # The versions of a file's modules: some networks rename old tensors by them, MNASNet insists on them.
    versions = getattr(state, "_metadata", None) or model.state_dict()._metadata  # type: ignore[attr-defined]
    if arch.startswith("vit_") and "encoder.pos_embedding" in state:
        state = _interpolated(state, image_size, model.patch_size, source)  # type: ignore[arg-type]
    dropped = (f"{classifier}.", *(f"{name}." for name in AUXILIARY))
    kept = OrderedDict(
        (_current_densenet_name(name) if arch.startswith("densenet") else name, value)
        for name, value in state.items()
        if not name.startswith(dropped)
    )
    kept._metadata = versions  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise NotFoundError(f"{source} does not fit {arch}: {reason}") from error
    missing = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
    for label, names in (("lacks", missing), ("has unknown", result.unexpected_keys)):
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise NotFoundError(f"{source} does not fit {arch}: it {label} {len(names)} tensors ({listed})")


def _current_densenet_name(name: str) -> str:
    """torchvision's files still say ``norm.1`` where the network says ``norm1``."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)


def _interpolated(state: Mapping[str, Tensor], image_size: int, patch_size: int, source: str) -> dict[str, Tensor]:
    """``state`` of a ViT with its position embeddings resampled to the patches of ``image_size``."""
    try:
        return interpolate_embeddings(image_size, patch_size, OrderedDict(state))
    except ValueError as error:
        raise NotFoundError(f"{source}: position embeddings that cannot be resampled ({error})") from error


def _read(file: Path, source: str) -> dict[str, Tensor]:
    """State dict in ``file`` (.safetensors, or a pickle of tensors), without trainers' wrappings."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise NotFoundError(
            f"{source}: not a readable state dict of tensors alone (damaged, or a whole pickled model: save "
            "model.state_dict() instead)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise NotFoundError(f"{source} holds no state dict: names and tensors are expected")
    result = OrderedDict((name.removeprefix("module."), value) for name, value in state.items())
    if hasattr(state, "_metadata"):
        result._metadata = state._metadata  # type: ignore[attr-defined]
    return result


def _metadata(file: Path) -> dict[str, str]:
    """What an export says beside the tensors: arch, image_size, mean, std."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict(tensors.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise NotFoundError(f"model.model_id={file}: not a readable safetensors file ({error})") from error


def _download(arch: str, weights: WeightsEnum, allowed: bool) -> dict[str, Tensor]:
    """torchvision's weights, cached or downloaded; one process downloads while the others wait."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = os.path.basename(urlparse(weights.url).path)
    how = (
        f"get {weights.url} where there is a network and put it there (TORCH_HOME says where), or give "
        "model.model_id=/path/to/weights.pth"
    )
    if not allowed and not (folder / name).is_file():
        raise NotFoundError(
            f"model.arch={arch}: weights {weights.name} not found: {folder / name} is not there (a dry run downloads "
            f"nothing, the run itself would try); {how}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        broken = (folder / name).is_file()
        state = "is damaged or partial: remove it" if broken else "is not there, and downloading it failed"
        reason = " ".join(str(error).split())[:120]
        raise NotFoundError(
            f"model.arch={arch}: weights {weights.name} not found: {folder / name} {state} ({reason}); {how}"
        ) from error


def _triple(value: str | list[float]) -> Triple:
    numbers = [float(v) for v in (value.split(",") if isinstance(value, str) else value)]
    return numbers[0], numbers[1], numbers[2]
