"""What the image processor beside a network's weights does to an image: honoured to the pixel, or refused."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from nostalgia.data.resizing import Resizing
from nostalgia.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

Triple = tuple[float, float, float]
HALF = (0.5, 0.5, 0.5)
FILE = "preprocessor_config.json"
#: Settings of our own, beside those of the architecture; of images in [0, 1].
NORMALISATION = ("image_mean", "image_std")
INTERPOLATIONS = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}
WHOLE_SIZE = 384  # from this side on ConvNeXt's processor crops nothing
ROUNDING = 1.5 / 255  # one grey level: a processor that resizes real numbers does not round to whole ones


@dataclass(frozen=True)
class Preparation:
    """How an image (3, H, W) uint8 becomes the network's input; ``bgr``: blue comes first."""

    resizing: Resizing
    mean: Triple
    std: Triple
    bgr: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        """The input (3, S, S) float64 of the network."""
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (self.mean, self.std))
        pixels = (self.resizing(image).double() / 255 - mean) / std
        return pixels.flip(0) if self.bgr else pixels


def preparation(
    model_id: str, folder: Path, settings: PreTrainedConfig, config: Mapping[str, Any], image_size: int | None
) -> Preparation:
    """That of the image processor in ``folder``, at ``image_size`` (None: its own).

    ``config`` may overrule mean and std. Raises UsageError for a processor that does something else to an image.
    """
    mean, std = (triple(config, key) for key in NORMALISATION)
    file = folder / FILE
    if not file.is_file():
        if mean is None or std is None:
            _say(
                "%s: no preprocessor_config.json beside the weights; images are normalised with mean and std 0.5. "
                "Say otherwise by model.config.image_mean=[...] and model.config.image_std=[...]",
                model_id,
            )
        return Preparation(Resizing(image_size or native_size(settings) or 224), mean or HALF, std or HALF)
    where = f"model.model_id={model_id}: {file}"
    processor = _load(where, file, settings)
    own_mean, own_std = _normalisation(processor, where)
    bgr = bool(getattr(processor, "do_flip_channel_order", False))
    resizing, reason = _resizing(processor, where)
    if resizing is not None:
        reason = _difference(processor, Preparation(resizing, own_mean, own_std, bgr), model_id)
    if reason:
        if image_size is None:
            raise UsageError(
                f"{where}: {reason}; with dataset.image_size=N the central square of an image is resized to N pixels"
            )
        _say("%s: its image processor is not followed (%s): the central square is resized", model_id, reason)
        resizing = Resizing(image_size)
    assert resizing is not None
    if image_size not in (None, resizing.size):
        scaled = resizing.at(image_size)
        _say(
            "%s: its image processor resizes to %d pixels and crops %d; for dataset.image_size=%d in proportion, %d and %d",
            *(model_id, resizing.target, resizing.size, image_size, scaled.target, scaled.size),
        )
        resizing = scaled
    return Preparation(resizing, mean or own_mean, std or own_std, bgr)


def processor_settings(made: Preparation) -> dict[str, Any]:
    """`preprocessor_config.json` of a processor that prepares an image in this way."""
    resizing, square = made.resizing, {"height": made.resizing.size, "width": made.resizing.size}
    target = resizing.target
    resample = next(int(name) for name, mode in INTERPOLATIONS.items() if mode == resizing.interpolation)
    settings = {
        # Named after BiT, it resizes, crops, rescales and normalises for any network.
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"height": target, "width": target} if resizing.stretch else {"shortest_edge": target},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(made.mean),
        "image_std": list(made.std),
    }
    if made.bgr:  # MobileViT's turns the channels too, and does not normalise
        settings |= {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}
        settings |= {"rescale_factor": 1 / (255 * made.std[0])}
    return settings


def native_size(settings: PreTrainedConfig) -> int | None:
    """Side of the images that the network was made for; None where it has no opinion (convolutions)."""
    size = getattr(settings, "image_size", None)
    return size if isinstance(size, int) else (size[0] if size else None)


def triple(values: Mapping[str, Any], key: str) -> Triple | None:
    """Three numbers (one stands for three), or None where there are none."""
    value = values.get(key)
    if value is None:
        return None
    numbers = [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * 3
    if len(numbers) != 3:
        raise UsageError(f"model.config.{key} wants three numbers, one a colour, not {value}")
    return numbers[0], numbers[1], numbers[2]


def read_json(model_id: str, file: Path) -> dict[str, Any]:
    """The settings in a file of a model's folder; raises NotFoundError for one that holds none."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
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


def _load(where: str, file: Path, settings: PreTrainedConfig) -> Any:
    from transformers import AutoImageProcessor

    model_id = where.removeprefix("model.model_id=").split(": ")[0]
    if "auto_map" in read_json(model_id, file):
        raise UsageError(f"model.model_id={model_id}: its image processor asks for Python code of its own, never run")
    try:
        return AutoImageProcessor.from_pretrained(file.parent, config=settings, trust_remote_code=False)
    except (ValueError, OSError, TypeError) as error:
        raise UsageError(f"{where} is not an image processor of transformers") from error


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
        mean = triple({"image_mean": getattr(processor, "image_mean", None)}, "image_mean") or HALF
        std = triple({"image_std": getattr(processor, "image_std", None)}, "image_std") or HALF
    times = 2 if getattr(processor, "include_top", False) else 1  # EfficientNet's divides once more
    red, green, blue = (m / white for m in mean)
    return (red, green, blue), (std[0] ** times / white, std[1] ** times / white, std[2] ** times / white)


def _resizing(processor: Any, where: str) -> tuple[Resizing | None, str]:
    """What the processor does to an image's size, or why it makes no squares of one size."""
    size = _sides(getattr(processor, "size", None))
    crop = _sides(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else {}
    if not getattr(processor, "do_resize", True):
        return None, "do_resize=false leaves images at their own size"
    for sides in (size, crop):
        if sides.get("height") != sides.get("width"):
            return None, f"images of {sides['height']} x {sides['width']} pixels are no squares"
    edge, side = size.get("shortest_edge"), size.get("height")
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return None, f"size={size} is neither shortest_edge nor height and width"
    how = Resizing(
        crop.get("height") or side or edge or 0, edge or side or 0, edge is None, _interpolation(processor, where)
    )
    if edge is not None and not crop:  # ConvNeXt's crop_pct; without it nothing makes a square
        share = getattr(processor, "crop_pct", None)
        if not share:
            return None, f"size={size} without do_center_crop leaves images oblong"
        how = replace(how, edge=edge if edge >= WHOLE_SIZE else int(edge / share), stretch=edge >= WHOLE_SIZE)
    return how, ""


def _interpolation(processor: Any, where: str) -> str:
    resample = getattr(processor, "resample", None)
    resample = Image.Resampling.BILINEAR if resample is None else resample
    mode = INTERPOLATIONS.get(resample)
    if mode is None:
        known = ", ".join(f"{int(one)} ({one.name.lower()})" for one in INTERPOLATIONS)
        raise UsageError(f"{where}: resample={int(resample)}: allowed are {known}; change it in that file")
    return mode


def _sides(size: Any) -> dict[str, int]:
    """A processor's size by name, however it is given."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {name: int(side) for name, side in dict(size or {}).items() if side}


def _difference(processor: Any, made: Preparation, model_id: str) -> str:
    """Why the processor makes another thing of an image than we do, by trying one; empty where it does not."""
    height, width = made.resizing.target + 37, made.resizing.target * 3 // 2 + 50
    y, x, colour = torch.arange(height)[:, None], torch.arange(width), torch.arange(3)[:, None, None]
    image = (128 + 70 * torch.sin(y / 5 + colour) * torch.sin(x / 7 - colour)).to(torch.uint8)
    try:
        theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0]).double()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        return f"{type(processor).__name__} cannot take an image ({' '.join(str(error).split())[:100]})"
    ours = made(image)
    if theirs.shape != ours.shape:
        return f"{type(processor).__name__} makes {tuple(theirs.shape)} of an image where its settings say {tuple(ours.shape)}"
    off = float((theirs - ours).abs().max()) * max(made.std)  # in units of white
    if off > ROUNDING:
        return (
            f"{type(processor).__name__} makes other pixels of an image than its settings say (by {off:.1%} of white)"
        )
    if off > 1e-5:
        _say("%s: pixels equal those of its image processor to a grey level, not exactly", model_id)
    return ""


def _say(line: str, *values: Any) -> None:
    """Once, not by every rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning(line, *values)
