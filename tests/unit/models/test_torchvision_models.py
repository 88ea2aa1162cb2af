"""torchvision backbones: every architecture by name, weights by path, and every way of not having them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from nostalgia.data.resizing import Resizing
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models import Backbone, build_backbone
from nostalgia.models.backbone import flattened
from nostalgia.models.torchvision_models import HALF, architectures, bare
from tests.unit.models.tiny import images, resnet18, without_memory

#: Width of the penultimate features, from the architectures' papers.
WIDTHS = {
    "resnet18": 512,
    "resnet50": 2048,
    "vgg16": 4096,
    "vit_b_16": 768,
    "swin_t": 768,
    "alexnet": 4096,
} | {
    "densenet121": 1024,
    "inception_v3": 2048,
    "squeezenet1_0": 512,
    "mobilenet_v3_large": 1280,
}


def load(**words):
    return build_backbone(framework="torchvision", **words)


def saved(tmp_path, arch="squeezenet1_1", **arguments):
    """A torchvision classifier and the file its state dict was saved to."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, weights=None, **arguments).eval()
    file = tmp_path / f"{arch}.pth"
    torch.save(model.state_dict(), file)
    return model, file


TYPICAL = ("resnet18", "vit_b_16", "convnext_tiny", "swin_t", "mobilenet_v3_small", "densenet121")


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=() if arch in TYPICAL else pytest.mark.exhaustive) for arch in architectures()],
)
def test_every_architecture_loses_its_classifier_and_uses_every_parameter(arch):
    with without_memory():
        model, classifier = bare(arch, {}, 224)
    backbone = Backbone(
        model, flattened, resizing=Resizing(224), mean=HALF, std=HALF, framework="torchvision", source=arch, arch=arch
    )
    assert isinstance(model.get_submodule(classifier), torch.nn.Identity)
    assert backbone.feature_dim == WIDTHS.get(arch, backbone.feature_dim) != 1000
    assert backbone.unused == frozenset()


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "wrapped"])
def test_a_state_dict_by_path_gives_the_same_features(tmp_path, suffix):
    model, file = saved(tmp_path, num_classes=7)
    if suffix == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(model.state_dict(), file)
    elif suffix == "wrapped":
        torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, file)
    backbone = load(arch="squeezenet1_1", model_id=str(file), image_size=32)
    assert backbone.mean == (0.485, 0.456, 0.406)
    model.classifier[1] = torch.nn.Identity()
    with torch.no_grad():
        x = images(backbone)
        torch.testing.assert_close(backbone(x), model(x), rtol=0, atol=1e-6)


def test_resnet18_by_path(tmp_path):
    model, file = saved(tmp_path, "resnet18")
    backbone = load(arch="resnet18", model_id=str(file), image_size=32)
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        x = images(backbone)
        torch.testing.assert_close(backbone(x), model(x), rtol=0, atol=1e-6)
    assert load(arch="resnet18", model_id=str(file)).image_size == 224


def test_densenets_former_names_are_understood(tmp_path):
    small = {"growth_rate": 4, "num_init_features": 8, "block_config": (1, 1, 1, 1)}
    model = torchvision.models.DenseNet(**small).eval()
    former = OrderedDict(
        (name.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in name else name, value)
        for name, value in model.state_dict().items()
    )
    assert any("norm.1" in name for name in former)
    target = torchvision.models.DenseNet(**small)
    from nostalgia.models.torchvision_models import _current_densenet_name

    target.load_state_dict({_current_densenet_name(name): value for name, value in former.items()})


def test_mnasnet_loads_from_a_file_that_keeps_no_versions(tmp_path):
    model, _ = saved(tmp_path, "mnasnet0_5")
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    backbone = load(arch="mnasnet0_5", model_id=str(file), image_size=32)
    model.classifier[1] = torch.nn.Identity()
    with torch.no_grad():
        x = images(backbone)
        torch.testing.assert_close(backbone(x), model(x), rtol=0, atol=1e-6)


def test_a_vision_transformer_takes_its_positions_to_another_image_size(tmp_path):
    small = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    with pytest.raises(UsageError, match="patch_size"):  # the builder of vit_b_16 has its own
        load(arch="vit_b_16", pretrained=False, config={"patch_size": 8})
    from nostalgia.models.torchvision_models import _interpolated

    native = torchvision.models.VisionTransformer(image_size=16, **small)
    other = torchvision.models.VisionTransformer(image_size=32, **small)
    state = _interpolated(native.state_dict(), 32, 8, "weights")
    other.load_state_dict(state)
    expected = torch.nn.functional.interpolate(
        native.encoder.pos_embedding[:, 1:].transpose(1, 2).reshape(1, 16, 2, 2),
        size=4,
        mode="bicubic",
        align_corners=True,
    )
    torch.testing.assert_close(other.encoder.pos_embedding[:, 1:], expected.flatten(2).transpose(1, 2))


def test_networks_ported_from_tensorflow_see_what_their_own_switch_would_show_them():
    """GoogLeNet with ``transform_input`` on ImageNet-normalised images = without it on images at 0.5."""
    torch.manual_seed(0)
    arguments = {"aux_logits": False, "init_weights": False}
    model = torchvision.models.googlenet(weights=None, transform_input=True, **arguments).eval()
    plain = torchvision.models.googlenet(weights=None, transform_input=False, **arguments).eval()
    plain.load_state_dict(model.state_dict())
    raw = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(plain((raw - 0.5) / 0.5), model((raw - mean) / std), rtol=1e-4, atol=1e-5)


def test_from_scratch_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = resnet18(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = resnet18(seed=5), resnet18(seed=6)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
    assert not torch.equal(first.model.conv1.weight, other.model.conv1.weight)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_weights_that_cannot_be_had_say_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(NotFoundError) as error:
        load(arch="resnet50")
    message = one_line(error)
    assert "IMAGENET1K_V2" in message
    assert str(tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth") in message
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in message
    assert "TORCH_HOME" in message


def test_weights_in_torch_home_are_found_and_partial_ones_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model, file = saved(tmp_path, "squeezenet1_1")
    cache = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(file.read_bytes())
    backbone = load(arch="squeezenet1_1", image_size=32)
    torch.testing.assert_close(backbone.model.features[0].weight, model.features[0].weight)
    cache.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(NotFoundError, match="damaged or partial") as error:
        load(arch="squeezenet1_1", image_size=32)
    one_line(error)


def test_a_file_of_another_network_is_refused(tmp_path):
    _, file = saved(tmp_path, "squeezenet1_0")
    with pytest.raises(NotFoundError, match="does not fit squeezenet1_1") as error:
        load(arch="squeezenet1_1", model_id=str(file))
    one_line(error)
    incomplete = torch.load(file, weights_only=True)
    del incomplete["features.0.weight"]
    torch.save(incomplete, file)
    with pytest.raises(NotFoundError, match=r"lacks 1 tensors \(features\.0\.weight\)"):
        load(arch="squeezenet1_0", model_id=str(file))


def test_a_pickled_model_is_not_unpickled(tmp_path):
    model, file = saved(tmp_path)
    torch.save(model, file)
    with pytest.raises(NotFoundError, match=r"state_dict\(\)") as error:
        load(arch="squeezenet1_1", model_id=str(file))
    one_line(error)


@pytest.mark.parametrize(
    ("words", "kind", "match"),
    [
        ({"arch": "resnet81"}, UsageError, "did you mean resnet18"),
        ({"arch": None}, UsageError, "known are .*resnet18"),
        ({"arch": "fcn_resnet50"}, UsageError, "not a classification network"),
        ({"arch": "resnet18", "model_id": "/nowhere/weights.pth"}, NotFoundError, "no such file"),
        ({"arch": "resnet18", "model_id": "google/vit-base"}, NotFoundError, "null for the current weights"),
        ({"arch": "resnet18", "model_id": "IMAGENET9"}, UsageError, "IMAGENET1K_V1"),
        ({"arch": "alexnet", "pretrained": False, "image_size": 16}, UsageError, "16 x 16"),
        ({"arch": "resnet18", "pretrained": False, "config": {"nonsense": 1}}, UsageError, "nonsense"),
        ({"arch": "resnet18", "pretrained": False, "config": {"num_classes": 3}}, UsageError, "heads"),
    ],
)
def test_words_that_cannot_be_right(words, kind, match):
    with pytest.raises(kind, match=match) as error:
        load(**words)
    one_line(error)
