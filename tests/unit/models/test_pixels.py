"""The numbers that reach a network are those that its own image processor makes of an image of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from nostalgia.data.prepared import View
from nostalgia.models import Backbone, build_backbone
from nostalgia.models.export import _save_backbone
from tests.unit.models.tiny import CONFIGS, scratch

SIDE = 32
WINDOW = {"size": {"height": SIDE, "width": SIDE}}
EDGE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 2}
MEAN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("vit", "ViTImageProcessor", {**WINDOW, **MEAN}),
    "ViT, not normalised": ("vit", "ViTImageProcessor", {**WINDOW, "do_normalize": False}),
    "ViT, not rescaled": ("vit", "ViTImageProcessor", {**WINDOW, "do_rescale": False, "image_mean": [100, 110, 120]}),
    "ViT, to 2": ("vit", "ViTImageProcessor", {**WINDOW, **MEAN, "rescale_factor": 1 / 127.5}),
    "DeiT": ("deit", "DeiTImageProcessor", {**EDGE, **WINDOW}),
    "DINOv2": ("dinov2", "BitImageProcessor", EDGE),
    "Swin": ("swin", "ViTImageProcessor", {**WINDOW, **MEAN}),
    "ConvNeXt": ("convnext", "ConvNextImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_pct": 1.0}),
    "MobileViT": ("mobilevit", "MobileViTImageProcessor", EDGE),
}
MOBILEVIT = {
    "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "num_attention_heads": 2,
    "image_size": SIDE,
}  # fmt: skip


def made(kind: str, folder: Path) -> Backbone:
    model, processor, settings = KINDS[kind]
    if model == "mobilevit":
        config: dict[str, Any] = {"model_type": model, **MOBILEVIT}
        build_backbone(framework="hf", pretrained=False, config=config).model.save_pretrained(folder)  # type: ignore[operator]
    else:
        scratch(model, **({} if "image_size" not in CONFIGS[model] else {"image_size": SIDE})).model.save_pretrained(
            folder
        )  # type: ignore[operator]
    getattr(transformers, processor)(**settings).save_pretrained(folder)
    return build_backbone(framework="hf", model_id=str(folder), image_size=SIDE)


def pixels_of(backbone: Backbone, image: np.ndarray) -> torch.Tensor:
    """What the network is called with."""
    view = View(SIDE, backbone.mean, backbone.std, torch.device("cpu"), torch.float64)
    given: list[torch.Tensor] = []
    hook = backbone.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        backbone.double()(view.normalise_(view.scale(torch.from_numpy(image).permute(2, 0, 1)[None])))
    hook.remove()
    return given[0]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_the_image_processors_own(kind: str, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    backbone = made(kind, tmp_path / "model")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"].double()
    scale = float(expected.abs().max().clamp_min(1.0))
    torch.testing.assert_close(pixels_of(backbone, image), expected, rtol=0, atol=1e-6 * scale)
    _save_backbone(backbone.float(), tmp_path / "export")
    exported = transformers.AutoImageProcessor.from_pretrained(tmp_path / "export")
    found = exported(Image.fromarray(image), return_tensors="pt")["pixel_values"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * scale)


def test_another_way_of_resizing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scratch("vit", image_size=SIDE).model.save_pretrained(tmp_path)  # type: ignore[operator]
    crops = {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3}
    transformers.BitImageProcessor(**crops).save_pretrained(tmp_path)
    assert build_backbone(framework="hf", model_id=str(tmp_path)).image_size == SIDE
    assert "resamples by bicubic and crops 32 of 40 pixels" in caplog.text
