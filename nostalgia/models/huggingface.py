"""Backbones of Hugging Face transformers: from a hub id, a local folder, or a configuration alone.

Code from a repository is never run, and weights that lack a tensor are refused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from nostalgia.data.resizing import Resizing
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models import hub
from nostalgia.models.backbone import Backbone, class_token, token_pair
from nostalgia.models.image_processor import (
    HALF,
    NORMALISATION,
    Preparation,
    native_size,
    preparation,
    read_json,
    triple,
)
from nostalgia.models.seeding import seeded
from nostalgia.options import nearest

logger = logging.getLogger(__name__)

#: Conventions that the output alone does not tell. All others: ``pooler_output`` where there is one.
FEATURES: dict[str, Callable[[Any], Tensor]] = {
    "vit": class_token,
    "vit_msn": class_token,
    "deit": token_pair,
}
#: Architectures whose pooler is a trainable layer that their own classifier does not use.
WITHOUT_POOLER = ("vit", "deit")
#: How attention may be computed: ``model.config.attn_implementation``. Others have no gradients of float32 weights.
ATTENTION_KEY = "attn_implementation"
ATTENTION = ("sdpa", "eager")
UNSUITABLE = {"vit_mae": "hides patches at random in every forward pass"}


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
    mean, std = (triple(config, key) or HALF for key in NORMALISATION)
    if image_size is not None and "image_size" not in config and hasattr(settings, "image_size"):
        settings.image_size = image_size if isinstance(settings.image_size, int) else [image_size] * 2
    with seeded(seed), hub.quiet():
        model = _from_config(settings)
    made = Preparation(Resizing(image_size or native_size(settings) or 224), mean, std)
    return _backbone(model.float(), settings, made, source)


def _from_config(settings: PreTrainedConfig) -> nn.Module:
    try:
        model: nn.Module = AutoModel.from_config(settings, trust_remote_code=False, **_options(settings))
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(
            f"model.config is not valid for {settings.model_type}: its network cannot be made ({reason})"
        ) from error
    return model


def _pretrained(model_id: str, config: Mapping[str, Any], image_size: int | None, download: bool) -> Backbone:
    folder = hub.weights_folder(model_id, download)
    settings = _read_config(model_id, folder, config)
    hub.check_weights(model_id, folder)
    model, missing, surplus = _load(model_id, folder, settings)
    if unread := _inside(model, surplus):
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        logger.warning(
            "model.model_id=%s: %d of its tensors are not in this network and are left out (%s)",
            model_id,
            len(unread),
            shown,
        )
    backbone = _backbone(model, settings, preparation(model_id, folder, settings, config, image_size), model_id)
    lost = sorted(name for name in missing if name not in backbone.unused)
    if lost:
        raise NotFoundError(
            f"model.model_id={model_id}: {len(lost)} of the network's tensors are not in the weights "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}); they would be random"
        )
    return backbone


def _backbone(model: nn.Module, settings: PreTrainedConfig, made: Preparation, source: str) -> Backbone:
    image_size = made.resizing.size
    patch = getattr(settings, "patch_size", None)
    if isinstance(patch, int) and image_size % patch:
        lower = max(image_size // patch, 1) * patch
        raise UsageError(
            f"dataset.image_size={image_size} is not a multiple of the patch size {patch} of {source}: "
            f"take {lower} or {lower + patch}"
        )
    call = {}
    if (
        image_size != native_size(settings)
        and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    ):
        call["interpolate_pos_encoding"] = True
    return Backbone(
        model,
        FEATURES.get(settings.model_type),
        resizing=made.resizing,
        mean=made.mean,
        std=made.std,
        framework="hf",
        source=source,
        call=call,
        bgr=made.bgr,
    )


# What they say ----------------------------------------------------------------------------------------------


def _read_config(model_id: str, folder: Path, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    file = folder / "config.json"
    raw = read_json(model_id, file)
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
        setattr(
            settings, f"_{key}" if key == ATTENTION_KEY else key, value
        )  # transformers' name of it on a configuration
    return settings


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
        hint = nearest(str(kind), transformers.CONFIG_MAPPING.keys())
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
    if wanted.get(ATTENTION_KEY, ATTENTION[0]) not in ATTENTION:
        raise UsageError(f"model.config.{ATTENTION_KEY}={wanted[ATTENTION_KEY]}: allowed are {', '.join(ATTENTION)}")
    for key in wanted:
        if key not in known and key != ATTENTION_KEY:
            hint = nearest(key, sorted(known)) or f"; known are {', '.join(sorted(known)[:8])}, ..."
            raise UsageError(f"model.config.{key} is not a setting of {default.model_type}{hint}")
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
        vision: Any = getattr(settings, "vision_config", None)
        part: Any = transformers.MODEL_MAPPING.get(type(vision), None)
        remedy = ""
        if part is not None:
            remedy = f"; save its part of images: {part.__name__}.from_pretrained({where!r}).save_pretrained(FOLDER)"
        raise UsageError(
            f"{where}: {settings.model_type} is not an image backbone (its input is not pixel_values){remedy}"
        )


# The weights ------------------------------------------------------------------------------------------------


def _load(model_id: str, folder: Path, settings: PreTrainedConfig) -> tuple[nn.Module, set[str], set[str]]:
    """The network with its weights, the names of its tensors that they do not hold, and of theirs that it does not have."""
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
    return model, missing, set(info["unexpected_keys"])


def _inside(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that belong to a part that the network has, such as its encoder; a head is no part of it."""
    parts, prefix = dict(model.named_children()), f"{getattr(model, 'base_model_prefix', '')}."
    return sorted(name for name in names if name.removeprefix(prefix).partition(".")[0] in parts)


def _options(settings: PreTrainedConfig) -> dict[str, Any]:
    return {"add_pooling_layer": False} if settings.model_type in WITHOUT_POOLER else {}
