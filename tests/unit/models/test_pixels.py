"""The numbers that reach a network are those that its own image processor makes of an image, whatever its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from nostalgia.data.images import ArrayImages, FileImages
from nostalgia.data.prepared import Prepared, View
from nostalgia.data.resizing import Resizing
from nostalgia.data.stream import TaskLoader
from nostalgia.errors import UsageError
from nostalgia.models import Backbone, build_backbone
from nostalgia.models.export import _save_backbone
from tests.unit.models.tiny import CONFIGS, scratch

SIDE = 32
WINDOW = {"size": {"height": SIDE, "width": SIDE}}
CROP = {"crop_size": {"height": SIDE, "width": SIDE}}
MEAN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("vit", "ViTImageProcessor", {**WINDOW, **MEAN}),
    "ViT, bicubic": ("vit", "ViTImageProcessor", {**WINDOW, "resample": 3}),
    "ViT, nearest": ("vit", "ViTImageProcessor", {**WINDOW, "resample": 0}),
    "ViT, not normalised": ("vit", "ViTImageProcessor", {**WINDOW, "do_normalize": False}),
    "ViT, not rescaled": ("vit", "ViTImageProcessor", {**WINDOW, "do_rescale": False, "image_mean": [100, 110, 120]}),
    "ViT, to 2": ("vit", "ViTImageProcessor", {**WINDOW, **MEAN, "rescale_factor": 1 / 127.5}),
    "DeiT": ("deit", "DeiTImageProcessor", {"size": {"height": 40, "width": 40}, **CROP}),
    "DINOv2": ("dinov2", "BitImageProcessor", {"size": {"shortest_edge": 37}, **CROP}),
    "Swin": ("swin", "ViTImageProcessor", {**WINDOW, **MEAN, "resample": 3}),
    "ConvNeXt": ("convnext", "ConvNextImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_pct": 0.875}),
    "ConvNeXt, whole": ("convnext", "ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "EfficientNet": ("efficientnet", "EfficientNetImageProcessor", {**WINDOW, "resample": 3}),
    "EfficientNet, once": ("efficientnet", "EfficientNetImageProcessor", {**WINDOW, "include_top": False}),
    "MobileViT": ("mobilevit", "MobileViTImageProcessor", {"size": {"shortest_edge": 36}, **CROP}),
    "MobileViT, padded": ("mobilevit", "MobileViTImageProcessor", {"size": {"shortest_edge": 27}, **CROP}),
}
SIZES = ((SIDE, SIDE), (61, 90), (91, 60), (45, 46), (20, 31), (300, 41))  # of images, height and width
MOBILEVIT = {
    "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "num_attention_heads": 2,
    "image_size": SIDE,
}  # fmt: skip
EFFICIENTNET = {"image_size": SIDE, "width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 256}


def saved(kind: str, folder: Path, **settings: Any) -> Path:
    """A tiny network of the kind with its image processor, as transformers saves them."""
    model, processor, own = KINDS[kind]
    config = {"mobilevit": MOBILEVIT, "efficientnet": EFFICIENTNET}.get(model) or CONFIGS[model]
    if "image_size" in config:
        config = {**config, "image_size": SIDE}
    network = build_backbone(framework="hf", pretrained=False, config={"model_type": model, **config}).model
    network.save_pretrained(folder)  # type: ignore[operator]
    getattr(transformers, processor)(**own, **settings).save_pretrained(folder)
    return folder


def load(folder: Path, image_size: int | None = None) -> Backbone:
    return build_backbone(framework="hf", model_id=str(folder), image_size=image_size)


def photo(height: int, width: int) -> np.ndarray:
    """Noise on a ramp: pixels (H, W, 3) uint8."""
    noise = np.random.default_rng(height).integers(0, 100, (height, width, 3))
    return (noise + np.linspace(0, 155, width)[None, :, None]).astype(np.uint8)


def pixels_of(backbone: Backbone, prepared: Prepared) -> torch.Tensor:
    """What the network is called with, for the first image of ``prepared``."""
    view = View(backbone.resizing, backbone.mean, backbone.std, torch.device("cpu"), torch.float64)
    loader = TaskLoader(prepared, view, name="one", per_device_batch_size=1, train=False)
    (batch,) = next(loader.epoch(1)).micro_batches
    given: list[torch.Tensor] = []
    hook = backbone.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        backbone.double()(batch.images)
    hook.remove()
    return given[0]


def processed(folder: Path, image: Image.Image) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(image, return_tensors="pt")["pixel_values"].double()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max().clamp_min(1.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_the_image_processors_own(kind: str, tmp_path: Path) -> None:
    backbone = load(saved(kind, tmp_path / "model"))
    _save_backbone(backbone, tmp_path / "export")
    for height, width in SIZES:
        image = photo(height, width)
        expected = processed(tmp_path / "model", Image.fromarray(image))
        memory = Prepared([ArrayImages("x", image[None], [0], ["a"])], [()], backbone.resizing)
        assert_same(pixels_of(backbone, memory), expected)
        assert_same(processed(tmp_path / "export", Image.fromarray(image)), expected)


@pytest.mark.parametrize("kind", ["DINOv2", "DeiT"])
def test_large_files_are_decoded_whole_and_upright(kind: str, tmp_path: Path) -> None:
    backbone, file = load(saved(kind, tmp_path / "model")), tmp_path / "large.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(photo(500, 700)).save(file, quality=90, exif=turned)
    prepared = Prepared([FileImages("x", [str(file)], [0], ["a"])], [()], backbone.resizing)
    with Image.open(file) as image:
        expected = processed(tmp_path / "model", ImageOps.exif_transpose(image))
    assert_same(pixels_of(backbone, prepared), expected)


def test_another_size_is_seen_in_proportion_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved("DINOv2", tmp_path)
    assert load(folder).resizing == Resizing(SIDE, 37, interpolation="bicubic")
    assert caplog.text == ""
    assert load(folder, image_size=64).resizing == Resizing(64, 74, interpolation="bicubic")
    assert "resizes to 37 pixels and crops 32; for dataset.image_size=64 in proportion, 74 and 64" in caplog.text
    assert len(caplog.records) == 1


OBLONG = {"size": {"height": 32, "width": 40}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no resizing": ({"do_resize": False}, "do_resize=false leaves images at their own size"),
    "no square": (OBLONG, "32 x 40 pixels are no squares"),
    "no crop": ({"size": {"shortest_edge": SIDE}}, "without do_center_crop leaves images oblong"),
    "limits": ({"size": {"max_height": 32, "max_width": 32}}, "neither shortest_edge nor height and width"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_squares_is_refused_until_a_size_is_given(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, reason = REFUSED[what]
    scratch("vit", image_size=SIDE).model.save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.ViTImageProcessor(**settings).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"{reason}.*dataset.image_size=N"):
        load(tmp_path)
    assert load(tmp_path, image_size=SIDE).resizing == Resizing(SIDE)
    assert reason in caplog.text


def test_a_processor_that_does_more_than_its_settings_say_is_refused(tmp_path: Path) -> None:
    """LeViT's resizes to 256/224 of the size that its settings name."""
    scratch("vit", image_size=SIDE).model.save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.LevitImageProcessor(size={"shortest_edge": SIDE}, **CROP).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"LevitImageProcessor makes other pixels of an image than its settings say \(by "
    ):
        load(tmp_path)


def test_a_way_of_resampling_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resample=4: allowed are 0 \(nearest\), 2 \(bilinear\), 3 \(bicubic\)"):
        load(saved("ConvNeXt", tmp_path, resample=4))


def test_rounding_to_grey_levels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scratch("vit", image_size=SIDE).model.save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.DINOv3ViTImageProcessor(**WINDOW).save_pretrained(tmp_path)  # resizes real numbers
    assert load(tmp_path).resizing == Resizing(SIDE, SIDE, stretch=True)
    assert "to a grey level, not exactly" in caplog.text
