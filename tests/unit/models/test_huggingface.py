"""Hugging Face backbones: each model's own features, weights by path, every way of not having them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPConfig, ViTImageProcessor
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models import build_backbone, hub, scope_parameters
from tests.unit.models.tiny import CONFIGS, images, scratch


def save_classifier(folder: Path, kind: str = "vit", processor: bool = True) -> torch.nn.Module:
    """A classifier as the hub holds it: base model under a prefix, head, image processor."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind], num_labels=3)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(folder)
    if processor:
        ViTImageProcessor(
            size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
        ).save_pretrained(folder)
    return model


def load(folder: Path | str, **words):
    return build_backbone(framework="hf", model_id=str(folder), **words)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_gives_features_and_a_gradient_to_every_trainable_parameter(kind):
    backbone = scratch(kind)
    features = backbone(images(backbone))
    assert features.shape == (2, backbone.feature_dim)
    backbone.train()
    backbone(images(backbone)).square().sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vit", lambda out: out.last_hidden_state[:, 0]),
        ("deit", lambda out: torch.cat([out.last_hidden_state[:, 0], out.last_hidden_state[:, 1]], dim=1)),
        ("dinov2", lambda out: out.last_hidden_state[:, 0]),
        ("swin", lambda out: out.last_hidden_state.mean(1)),
        ("convnext", lambda out: out.pooler_output),
    ],
)
def test_features_follow_the_models_convention(kind, expected):
    backbone = scratch(kind)
    with torch.no_grad():
        output = backbone.model(pixel_values=images(backbone))
        torch.testing.assert_close(backbone(images(backbone)), expected(output))


def test_the_distilled_pair_carries_deits_own_classifier(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("deit", **CONFIGS["deit"], num_labels=3)
    teacher = DeiTForImageClassificationWithTeacher(config).eval()
    teacher.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    backbone = load(tmp_path)
    heads = teacher.cls_classifier, teacher.distillation_classifier
    weight = torch.cat([head.weight for head in heads], dim=1) / 2
    bias = (heads[0].bias + heads[1].bias) / 2
    with torch.no_grad():
        logits = backbone(images(backbone)) @ weight.T + bias
        torch.testing.assert_close(logits, teacher(images(backbone)).logits, rtol=0, atol=1e-6)


def test_pretrained_weights_by_path_give_the_same_features_size_and_normalisation(tmp_path):
    model = save_classifier(tmp_path)
    backbone = load(tmp_path)
    assert (backbone.image_size, backbone.mean, backbone.std) == (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.no_grad():
        expected = model.vit(images(backbone)).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone(images(backbone)), expected, rtol=0, atol=1e-6)


def test_another_image_size_interpolates_positions_as_the_library_does(tmp_path):
    model = save_classifier(tmp_path)
    backbone = load(tmp_path, image_size=32)
    x = images(backbone)
    assert x.shape[-1] == 32
    with torch.no_grad():
        expected = model.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-6)


def test_half_precision_weights_are_loaded_in_float32(tmp_path):
    save_classifier(tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.float32}


def test_from_scratch_weights_depend_on_the_seed_alone_and_leave_the_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = scratch(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = scratch(seed=5), scratch(seed=6)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    weight = "model.layers.0.mlp.fc1.weight"
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert (first.mean, first.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_architecture_of_a_folder_without_its_weights(tmp_path):
    save_classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    backbone = load(tmp_path, pretrained=False)
    assert backbone.feature_dim == 16
    assert scope_parameters(backbone)


def test_a_network_without_image_processor_says_that_it_assumes_a_normalisation(tmp_path, caplog, monkeypatch):
    save_classifier(tmp_path, processor=False)
    assert load(tmp_path).mean == (0.5, 0.5, 0.5)
    assert "preprocessor_config.json" in caplog.text
    caplog.clear()
    told = load(tmp_path, config={"image_mean": [0.1, 0.2, 0.3], "image_std": 0.4})
    assert (told.mean, told.std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert caplog.text == ""
    monkeypatch.setenv("RANK", "1")  # of two ranks, one says so
    load(tmp_path)
    assert caplog.text == ""


# What is missing or wrong: one line, the right exit code, nothing random instead --------------------------


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_hub_id_that_cannot_be_had_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError) as error:
        load("google/vit-base-patch16-224")
    message = one_line(error)
    assert "HF_HOME" in message
    assert str(tmp_path) in message
    assert "hf download google/vit-base-patch16-224" in message


def cache_as_the_hub_does(cache: Path, model_id: str) -> Path:
    """The snapshot folder of a model in an empty hub cache."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_the_hubs_cache_is_asked_before_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = cache_as_the_hub_does(tmp_path, "someone/tiny-vit")
    save_classifier(folder)
    assert load("someone/tiny-vit").feature_dim == 16
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(NotFoundError, match="partial download"):
        load("someone/tiny-vit")


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(NotFoundError, match="no such folder"):
        load(tmp_path / "nothing")


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    save_classifier(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layer.1.intermediate.dense.weight"))  # the name in files
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFoundError, match=r"layers\.1\.mlp\.fc1\.weight.*random") as error:
        load(tmp_path)
    one_line(error)


def test_weights_of_a_part_that_the_network_has_not_are_named_and_a_head_is_not(tmp_path, caplog):
    save_classifier(tmp_path)
    load(tmp_path)
    assert caplog.messages == []
    load(tmp_path, config={"num_hidden_layers": 1})
    (message,) = caplog.messages
    assert "are not in this network" in message
    assert "layers.1." in message
    assert "classifier" not in message


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_how_attention_is_computed_can_be_chosen(tmp_path, kind):
    save_classifier(tmp_path, kind)
    fused = load(tmp_path)
    plain = load(tmp_path, config={"attn_implementation": "eager"})
    assert (fused.model.config._attn_implementation, plain.model.config._attn_implementation) == ("sdpa", "eager")
    torch.testing.assert_close(plain(images(plain)), fused(images(fused)))
    fresh = load(tmp_path, config={"attn_implementation": "eager"}, pretrained=False)
    assert fresh.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("pretrained", [True, False])
def test_an_attention_without_gradients_is_refused(tmp_path, pretrained):
    save_classifier(tmp_path)
    with pytest.raises(UsageError, match=r"attn_implementation=flash_attention_2: allowed are sdpa, eager") as error:
        load(tmp_path, config={"attn_implementation": "flash_attention_2"}, pretrained=pretrained)
    one_line(error)


def test_an_unused_tensor_may_be_missing(tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("dinov2", **CONFIGS["dinov2"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "mask_token" not in name}
    assert len(kept) == len(tensors) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(tmp_path).feature_dim == 16


@pytest.mark.parametrize("damage", ["absent", "truncated", "other shapes"])
def test_damaged_weights_are_refused(tmp_path, damage):
    save_classifier(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "absent":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    else:
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 48}))
    with pytest.raises(NotFoundError, match=str(tmp_path)) as error:
        load(tmp_path)
    one_line(error)


@pytest.mark.parametrize("kind", ["vit", "homemade"])
def test_a_model_that_asks_for_its_own_code_is_refused(tmp_path, kind):
    save_classifier(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("raise SystemExit('this code was run')\n")
    for pretrained in (True, False):
        with pytest.raises(UsageError, match="auto_map") as error:
            load(tmp_path, pretrained=pretrained)
        one_line(error)


@pytest.mark.parametrize(
    ("content", "kind", "match"),
    [
        ("{", NotFoundError, "not valid JSON"),
        ('{"model_type": "homemade"}', UsageError, "homemade"),
        ('{"model_type": "bert"}', UsageError, "not an image backbone"),
        ('{"model_type": "vit_mae"}', UsageError, "at random"),
    ],
)
def test_settings_that_cannot_be_a_backbone(tmp_path, content, kind, match):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(kind, match=match) as error:
        load(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"config": {"model_type": "vitt"}}, "did you mean vit"),
        ({"config": {"model_type": "vit", "hidden_sizee": 16}}, "did you mean hidden_size"),
        ({"config": {}}, "model_type"),
        ({"config": {"model_type": "vit", "hidden_size": "wide"}}, "not valid"),
        ({"config": {"model_type": "vit", **CONFIGS["vit"]}, "image_size": 20}, "take 16 or 24"),
        ({"config": {"model_type": "vit", "image_mean": [1, 2]}}, "three numbers"),
        ({"config": {"model_type": "vit"}, "arch": "resnet18"}, "torchvision"),
        ({"config": {"model_type": "vit"}, "image_size": 0}, "at least one"),
    ],
)
def test_words_that_cannot_be_right(words, match):
    with pytest.raises(UsageError, match=match) as error:
        build_backbone(framework="hf", pretrained=False, **words)
    one_line(error)


def test_an_unknown_framework_and_missing_id():
    with pytest.raises(UsageError, match="hf and torchvision"):
        build_backbone(framework="timm")
    with pytest.raises(UsageError, match="model_id"):
        build_backbone(framework="hf")


def test_freezing_for_a_while_gives_back_what_was_trainable_before():
    backbone = scratch("dinov2")
    before = {name: p.requires_grad for name, p in backbone.named_parameters()}
    assert not before["model.embeddings.mask_token"]
    protected = set(scope_parameters(backbone))
    backbone.set_trainable(False)
    backbone.set_trainable(False)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert set(scope_parameters(backbone)) == protected
    backbone.set_trainable(True)
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == before


def test_a_network_of_grey_images_is_refused_for_what_it_is():
    with pytest.raises(UsageError, match="takes images of 1 channels; allowed are networks of 3"):
        scratch("vit", num_channels=1)


@pytest.mark.parametrize(
    "setting", [{"hidden_act": "foo"}, {"num_attention_heads": 0}, {"hidden_size": -4}, {"patch_size": 0}]
)
def test_settings_that_make_no_network_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"model.config is not valid for (model_type=)?vit") as caught:
        build_backbone(framework="hf", pretrained=False, config={"model_type": "vit", **CONFIGS["vit"], **setting})
    assert "\n" not in str(caught.value)


def test_a_network_of_images_and_text_names_its_part_of_images(tmp_path):
    """And one that needs more than images says what, not that another size of images would do."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPConfig(text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8})
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(UsageError, match=r"CLIPVisionModel.from_pretrained\('.*clip'\).save_pretrained"):
        build_backbone(framework="hf", model_id=str(tmp_path / "clip"))
    with pytest.raises(UsageError, match=r"more than pixel_values .*spatial_shapes.*; allowed are networks of images"):
        build_backbone(
            framework="hf", pretrained=False, config={"model_type": "siglip2_vision_model", **small}, image_size=16
        )
