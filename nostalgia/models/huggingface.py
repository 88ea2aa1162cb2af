"""Backbones of Hugging Face transformers: from a hub id, a local folder, or a configuration alone.

Code from a repository is never run, and weights that lack a tensor are refused.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models import hub
from nostalgia.models.backbone import Backbone, class_token, token_pair
from nostalgia.models.seeding import seeded

logger = logging.getLogger(__name__)

Triple = tuple[float, float, float]
HALF = (0.5, 0.5, 0.5)
SIDES = ("height", "shortest_edge")  # of an image processor's size

#: Conventions that the output alone does not tell. All others: ``pooler_output`` where there is one.
FEATURES: dict[str, Callable[[Any], Tensor]] = {
    "vit": class_token,
    "vit_msn": class_token,
    "deit": token_pair,
}
#: Architectures whose pooler is a trainable layer that their own classifier does not use.
WITHOUT_POOLER = ("vit", "deit")
UNSUITABLE = {"vit_mae": "hides patches at random in every forward pass"}
#: How images are normalised: not part of the network's own configuration, but accepted beside it.
NORMALISATION = ("image_mean", "image_std")


def build(
    model_id: str | None,
    pretrained: bool,
    config: Mapping[str, Any],
    image_size: int | None,
    seed: int,
    download: bool = True,
) -> Backbone:
    """Backbone with the weights of ``model_id``, or, when not ``pretrained``, with random ones.

    Raises NotFoundError for weights or settings that cannot be had, UsageError for what cannot be a backbone.
    """
    if pretrained:
        if model_id is None:
            raise UsageError("model.pretrained=true needs model.model_id: a hub id or a local folder")
        return _pretrained(model_id, config, image_size, download)
    settings, source = _scratch_config(model_id, config, download)
    mean, std = (_triple(config, key) or HALF for key in NORMALISATION)
    if image_size is not None and "image_size" not in config and hasattr(settings, "image_size"):
        settings.image_size = image_size if isinstance(settings.image_size, int) else [image_size] * 2
    with seeded(seed), hub.quiet():
        model = AutoModel.from_config(settings, trust_remote_code=False, **_options(settings))
    size = image_size or _native_size(settings) or 224
    return _backbone(model.float(), settings, size, mean, std, source)


def _pretrained(model_id: str, config: Mapping[str, Any], image_size: int | None, download: bool) -> Backbone:
    folder = hub.weights_folder(model_id, download)
    settings = _read_config(model_id, folder, config)
    hub.check_weights(model_id, folder)
    model, missing = _load(model_id, folder, settings)
    size, mean, std, bgr = _processing(model_id, folder, settings, config)
    backbone = _backbone(model, settings, image_size or size, mean, std, model_id, bgr)
    lost = sorted(name for name in missing if name not in backbone.unused)
    if lost:
        raise NotFoundError(
            f"model.model_id={model_id}: {len(lost)} of the network's tensors are not in the weights "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}); they would be random"
        )
    return backbone


def _backbone(
    model: nn.Module,
    settings: PreTrainedConfig,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    source: str,
    bgr: bool = False,
) -> Backbone:
    patch = getattr(settings, "patch_size", None)
    if isinstance(patch, int) and image_size % patch:
        lower = max(image_size // patch, 1) * patch
        raise UsageError(
            f"dataset.image_size={image_size} is not a multiple of the patch size {patch} of {source}: "
            f"take {lower} or {lower + patch}"
        )
    call = {}
    if (
        image_size != _native_size(settings)
        and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    ):
        call["interpolate_pos_encoding"] = True
    return Backbone(
        model,
        FEATURES.get(settings.model_type),
        image_size=image_size,
        mean=mean,
        std=std,
        framework="hf",
        source=source,
        call=call,
        bgr=bgr,
    )


# What they say ----------------------------------------------------------------------------------------------


def _read_config(model_id: str, folder: Path, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    file = folder / "config.json"
    raw = _read_json(model_id, file)
    if "auto_map" in raw:
        raise UsageError(
            f"model.model_id={model_id}: its config.json asks for Python code of its own (auto_map), which "
            "is never run here; take a model that transformers itself implements"
        )
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UsageError(
            f"model.model_id={model_id}: model_type {raw.get('model_type')!r} in {file} is not known to "
            f"transformers {transformers.__version__}, or its settings are not valid"
        ) from error
    _check_architecture(settings, f"model.model_id={model_id}")
    for key, value in _own_settings(settings, overrides).items():
        setattr(settings, key, value)
    return settings


def _read_json(model_id: str, file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise NotFoundError(
            f"model.model_id={model_id}: {file} is missing or cannot be read; a model's folder holds "
            "config.json and model.safetensors, as save_pretrained leaves them"
        ) from error
    except ValueError as error:
        raise NotFoundError(f"model.model_id={model_id}: {file} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise NotFoundError(f"model.model_id={model_id}: {file} holds no settings")
    return raw


def _scratch_config(model_id: str | None, config: Mapping[str, Any], download: bool) -> tuple[PreTrainedConfig, str]:
    """Configuration of a network with random weights, and a name for it in messages."""
    kind = config.get("model_type")
    if kind is None and model_id is not None:
        return _read_config(model_id, hub.settings_folder(model_id, download), config), f"{model_id} (random weights)"
    if kind is None:
        raise UsageError("model.pretrained=false needs model.config.model_type (for instance vit) or model.model_id")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError as error:
        near = difflib.get_close_matches(str(kind), transformers.CONFIG_MAPPING.keys(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"model.config.model_type={kind} is not known to transformers{hint}") from error
    _check_architecture(default, f"model.config.model_type={kind}")
    try:
        settings = AutoConfig.for_model(kind, **_own_settings(default, config))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model.config is not valid for model_type={kind}: {reason}") from error
    return settings, f"{kind} (random weights)"


def _own_settings(default: PreTrainedConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without our own words; raises UsageError for a key that this architecture does not have."""
    wanted = {key: value for key, value in config.items() if key not in ("model_type", *NORMALISATION)}
    known = {*default.to_dict(), *default.attribute_map}
    for key in wanted:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known)[:8])}, ..."
            raise UsageError(f"model.config.{key} is not a setting of {default.model_type}: {hint}")
    return wanted


def _check_architecture(settings: PreTrainedConfig, where: str) -> None:
    """Refuse, before anything large is built, what cannot turn images into features."""
    if settings.model_type in UNSUITABLE:
        raise UsageError(f"{where}: {settings.model_type} {UNSUITABLE[settings.model_type]}: no fixed features")
    try:
        kind = transformers.MODEL_MAPPING[type(settings)]
    except KeyError as error:
        raise UsageError(f"{where}: transformers has no backbone for {settings.model_type}") from error
    if getattr(kind, "main_input_name", "") != "pixel_values":
        raise UsageError(f"{where}: {settings.model_type} is not an image backbone (its input is not pixel_values)")


def _processing(
    model_id: str, folder: Path, settings: PreTrainedConfig, config: Mapping[str, Any]
) -> tuple[int, Triple, Triple, bool]:
    """Image side, mean, std and whether blue comes first, of the image processor beside the weights.

    ``config`` may overrule mean and std, which are of images in [0, 1].
    """
    mean, std = (_triple(config, key) for key in NORMALISATION)
    size = _native_size(settings) or 224
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        if (mean is None or std is None) and int(os.environ.get("RANK", "0")) == 0:  # once, not by every rank
            logger.warning(
                "%s: no preprocessor_config.json beside the weights; images are normalised with mean and std "
                "0.5. "
                "Say otherwise by model.config.image_mean=[...] and model.config.image_std=[...]",
                model_id,
            )
        return size, mean or HALF, std or HALF, False
    if "auto_map" in _read_json(model_id, file):
        raise UsageError(f"model.model_id={model_id}: its image processor asks for Python code of its own, never run")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, config=settings, trust_remote_code=False)
    except (ValueError, OSError, TypeError) as error:
        raise UsageError(f"model.model_id={model_id}: {file} is not an image processor of transformers") from error
    own_mean, own_std = _normalisation(processor, f"model.model_id={model_id}: {file}")
    _say_resizing(processor, model_id)
    bgr = bool(getattr(processor, "do_flip_channel_order", False))
    return _processor_size(processor) or size, mean or own_mean, std or own_std, bgr


def _normalisation(processor: Any, where: str) -> tuple[Triple, Triple]:
    """Mean and std by which images in [0, 1] become what the processor makes of images in [0, 255].

    With r the factor it rescales by (1 where it does not), (255 r u - m) / s = (u - m / (255 r)) / (s / (255 r)).
    """
    for name in ("rescale_offset", "offset"):
        if getattr(processor, name, None):
            raise UsageError(
                f"{where}: {name} is not supported; give model.config.image_mean and model.config.image_std"
            )
    white = 255.0 * (float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0)
    if white <= 0:
        raise UsageError(f"{where}: rescale_factor={processor.rescale_factor}: allowed is more than 0")
    mean, std = (0.0,) * 3, (1.0,) * 3
    if getattr(processor, "do_normalize", True):
        mean = _triple({"image_mean": getattr(processor, "image_mean", None)}, "image_mean") or HALF
        std = _triple({"image_std": getattr(processor, "image_std", None)}, "image_std") or HALF
    red, green, blue = (m / white for m in mean)
    return (red, green, blue), (std[0] / white, std[1] / white, std[2] / white)


def _say_resizing(processor: Any, model_id: str) -> None:
    """Warn, once, of what the processor does to an image's size that is done in another way here."""
    others = []
    if getattr(processor, "do_resize", True) and getattr(processor, "resample", 2) not in (2, None):
        others.append(f"resamples by {Image.Resampling(processor.resample).name.lower()}")
    crop, size = getattr(processor, "crop_size", None), getattr(processor, "size", None)
    if getattr(processor, "do_center_crop", False) and crop is not None and _side(crop) != _side(size):
        others.append(f"crops {_side(crop)} of {_side(size)} pixels")
    if others and int(os.environ.get("RANK", "0")) == 0:
        logger.warning(
            "%s: its image processor %s; here the central square of an image is resized bilinearly",
            model_id,
            " and ".join(others),
        )


def _side(size: Any) -> int | None:
    """Side in pixels of a processor's size, however it is given."""
    if size is None or isinstance(size, int):
        return size
    values = [size.get(key) if isinstance(size, Mapping) else getattr(size, key, None) for key in SIDES]
    return next((int(value) for value in values if value), None)


def _processor_size(processor: Any) -> int | None:
    """Side of the images after the processor's own resizing and cropping."""
    crops = bool(getattr(processor, "do_center_crop", False))
    sizes = [getattr(processor, "crop_size", None)] if crops else []
    return next((side for size in [*sizes, getattr(processor, "size", None)] if (side := _side(size))), None)


def _native_size(settings: PreTrainedConfig) -> int | None:
    """Side of the images that the network was made for; None where it has no opinion (convolutions)."""
    size = getattr(settings, "image_size", None)
    return size if isinstance(size, int) else (size[0] if size else None)


def _triple(values: Mapping[str, Any], key: str) -> tuple[float, float, float] | None:
    """Three numbers (one stands for three), or None where there are none."""
    value = values.get(key)
    if value is None:
        return None
    numbers = [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * 3
    if len(numbers) != 3:
        raise UsageError(f"model.config.{key} wants three numbers, one a colour, not {value}")
    return numbers[0], numbers[1], numbers[2]


# The weights ------------------------------------------------------------------------------------------------


def _load(model_id: str, folder: Path, settings: PreTrainedConfig) -> tuple[nn.Module, set[str]]:
    """The network with its weights, and the names of its tensors that they do not hold."""
    try:
        # Missing tensors are drawn at random here, and refused by the caller.
        with seeded(0), hub.quiet():
            model, info = AutoModel.from_pretrained(
                folder,
                config=settings,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                **_options(settings),
            )
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotFoundError(
            f"model.model_id={model_id}: the weights in {folder} do not fit the network of its config.json "
            f"or are damaged: {reason}"
        ) from error
    missing = {name for name in info["missing_keys"] if not name.endswith("num_batches_tracked")}
    return model, missing


def _options(settings: PreTrainedConfig) -> dict[str, Any]:
    return {"add_pooling_layer": False} if settings.model_type in WITHOUT_POOLER else {}
