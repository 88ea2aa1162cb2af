"""LoRA: the right layers in old and new names, only adapters trainable, the same function at first."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from nostalgia.data.resizing import Resizing
from nostalgia.errors import UsageError
from nostalgia.models import Backbone, attach_lora, build_backbone, has_adapters, scope_parameters
from nostalgia.models.adapters import merged, resolve_targets, without_adapters
from tests.unit.models.tiny import CONFIGS, images, resnet18, scratch, shake


def adapted(backbone) -> list[str]:
    return [name for name, module in backbone.model.named_modules() if isinstance(module, BaseTunerLayer)]


def kinds(names: list[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_takes_adapters_that_all_get_a_gradient(kind):
    backbone = scratch(kind)
    x = images(backbone)
    with torch.no_grad():
        before = backbone(x)
    attach_lora(backbone, r=2, alpha=4, dropout=0.5)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), before, rtol=0, atol=1e-6)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == set(scope_parameters(backbone, "lora-only"))
    assert all("lora_" in name for name in trainable)
    backbone.train()
    backbone(x).square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == trainable


def test_default_targets_are_the_attentions_projections():
    assert kinds(resolve_targets(scratch("vit"), None)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(resolve_targets(scratch("vit"), None)) == 2 * 4
    kept_names = resolve_targets(scratch("swinv2"), None)
    assert kinds(kept_names) == {"query", "key", "value", "dense"}
    assert all("attention" in name for name in kept_names)


def test_default_targets_of_convolutional_networks_leave_the_first_layer():
    targets = resolve_targets(resnet18(), None)
    assert "conv1" not in targets
    assert {"layer1.0.conv1", "layer4.0.downsample.0"} <= set(targets)
    assert len(targets) == 19


def test_layers_whose_weight_is_read_without_a_call_are_no_targets():
    """torchvision's attention hands its projections' weights to one function; an adapter would do nothing."""
    backbone = build_backbone(framework="torchvision", arch="swin_t", pretrained=False, image_size=32)
    assert all(".qkv" not in name for name in resolve_targets(backbone, None))
    with pytest.raises(UsageError, match=r"qkv matches no layer .* that is called"):
        resolve_targets(backbone, ["qkv"])


@pytest.mark.parametrize(
    ("kind", "wanted", "found"),
    [
        ("vit", ["query", "value"], {"q_proj", "v_proj"}),
        ("vit", ["attention.attention.query"], {"q_proj"}),
        ("vit", ["attention.output.dense"], {"o_proj"}),
        ("vit", ["intermediate.dense"], {"fc1"}),
        ("vit", ["output.dense"], {"o_proj", "fc2"}),
        ("vit", ["q_proj", "mlp.fc1"], {"q_proj", "fc1"}),
        ("swinv2", ["q_proj", "v_proj"], {"query", "value"}),
    ],
)
def test_targets_in_old_and_new_names(kind, wanted, found):
    assert kinds(resolve_targets(scratch(kind), wanted)) == found


def test_one_numbered_layer_stays_one_layer():
    assert resolve_targets(scratch("vit"), ["layers.1.attention.q_proj"]) == ["layers.1.attention.q_proj"]
    with pytest.raises(UsageError, match="matches no layer"):
        resolve_targets(scratch("vit"), ["layer.1.attention.attention.query"])


def test_a_target_that_matches_nothing_lists_the_layers():
    with pytest.raises(UsageError) as error:
        attach_lora(scratch("vit"), r=2, alpha=4, target_modules=["q_proj", "nonsense"])
    message = str(error.value)
    assert "nonsense" in message
    assert r"layers.*.attention.q_proj (2)" in message
    assert "embeddings.patch_embeddings.projection" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"r": 0, "alpha": 1}, "r >= 1"),
        ({"r": 2, "alpha": 0}, "alpha > 0"),
        ({"r": 2, "alpha": 1, "dropout": 1.0}, "dropout < 1"),
        ({"r": 2, "alpha": 1, "target_modules": []}, "is empty"),
    ],
)
def test_words_that_cannot_be_right(words, match):
    with pytest.raises(UsageError, match=match):
        attach_lora(scratch("vit"), **words)


def test_grouped_convolutions_are_refused_by_name_and_left_out_by_default():
    backbone = scratch("convnext")
    assert not any("dwconv" in name for name in resolve_targets(backbone, None))
    with pytest.raises(UsageError, match="grouped convolution"):
        attach_lora(backbone, r=2, alpha=4, target_modules=["dwconv"])


def test_adapters_elsewhere_than_on_attention_are_said(caplog):
    attach_lora(scratch("vit"), r=2, alpha=4)
    assert not caplog.records
    attach_lora(scratch("convnext"), r=2, alpha=4)
    assert "no attention projection is called; adapters are on " in caplog.text


def test_layers_that_change_their_weight_before_use_take_no_adapter():
    """W + s B A, normalised, is not W normalised + s B A: merging would change the network."""
    config = {"model_type": "bit", "embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 8}
    backbone = build_backbone(framework="hf", pretrained=False, config=config, image_size=32)
    with pytest.raises(UsageError, match="can take an adapter"):
        attach_lora(backbone, r=2, alpha=4)
    with pytest.raises(UsageError, match="changes its weight before use"):
        attach_lora(backbone, r=2, alpha=4, target_modules=["conv2"])


def test_adapters_depend_on_the_seed_alone_and_leave_the_random_state():
    values = []
    for seed, state in ((3, 1), (3, 2), (4, 1)):
        backbone = scratch("vit")
        torch.manual_seed(state)
        before = torch.get_rng_state()
        attach_lora(backbone, r=2, alpha=4, dropout=0.1, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        values.append(torch.cat([p.flatten() for p in scope_parameters(backbone).values()]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_adapters_stay_attached_and_are_attached_once():
    backbone = scratch("vit")
    attach_lora(backbone, r=2, alpha=4)
    with pytest.raises(UsageError, match="already"):
        attach_lora(backbone, r=2, alpha=4)


def test_which_parameters_are_projected():
    plain = scratch("vit")
    assert set(scope_parameters(plain, "auto")) == {name for name, _ in plain.named_parameters()}
    assert scope_parameters(plain, "backbone").keys() == scope_parameters(plain, "auto").keys()
    with pytest.raises(UsageError, match="use_lora"):
        scope_parameters(plain, "lora-only")
    with pytest.raises(UsageError, match="lora-only are allowed"):
        scope_parameters(plain, "heads")
    plain.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing"):
        scope_parameters(plain)
    adapters = scratch("vit")
    attach_lora(adapters, r=2, alpha=4)
    assert len(scope_parameters(adapters, "auto")) == 2 * 2 * 4
    assert has_adapters(adapters)


@pytest.mark.parametrize("make", [lambda: scratch("vit"), resnet18], ids=["vit", "resnet18"])
def test_merging_and_taking_off_leave_the_original_alone(make):
    backbone, original = make(), make()
    attach_lora(backbone, r=2, alpha=4)
    shake(backbone)
    backbone.double()
    original.double()
    x = images(backbone).double()
    with torch.no_grad():
        trained = backbone(x)
        assert not torch.allclose(trained, original(x), atol=1e-3)
        together, bare = merged(backbone), without_adapters(backbone)
        torch.testing.assert_close(together(x), trained, rtol=1e-9, atol=1e-9)
        assert torch.equal(bare(x), original(x))
        assert torch.equal(backbone(x), trained)
    assert list(together.state_dict()) == list(original.state_dict())
    assert not has_adapters(together)
    assert adapted(backbone)


MOBILE = {
    "mobilenet_v1": {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32},
}


@pytest.mark.parametrize("kind", MOBILE)
def test_networks_that_read_their_layers_attributes_bear_adapters(kind):
    backbone = build_backbone(
        framework="hf", pretrained=False, config={"model_type": kind, **MOBILE[kind]}, image_size=32
    )
    backbone.double().train()  # batch norms by the batch: random features do not vanish
    x = images(backbone, batch=8).double()
    with torch.no_grad():
        before = backbone(x)
    attach_lora(backbone, r=2, alpha=4)
    backbone.double()
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), before)
    shake(backbone)
    with torch.no_grad():
        torch.testing.assert_close(merged(backbone)(x), backbone(x))
        assert float((backbone(x) - before).abs().max()) > 1e-2


class Reading(torch.nn.Module):
    """A network that reads of one of its layers what no adapter has."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 8), torch.nn.Conv2d(4, 4, 1)
        self.second.own = 2.0
        self.last = torch.nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x)) * self.second.own).flatten(1)


def reading():
    model, half = Reading(), (0.5,) * 3
    return Backbone(
        model, lambda y: y, resizing=Resizing(8), mean=half, std=half, framework="torchvision", source="a network"
    )


def test_a_layer_that_does_not_bear_an_adapter_is_left_out_and_said_so_or_refused_by_name(caplog):
    backbone = reading()
    attach_lora(backbone, r=1, alpha=1)
    assert adapted(backbone) == ["last"]
    assert "a network: no adapter on second, with which the network does not run" in caplog.text
    assert backbone(images(backbone)).shape == (2, 5)
    assert set(backbone.lora.target_modules) == {"last"}
    with pytest.raises(UsageError, match="a network does not run with an adapter on second; leave it out"):
        attach_lora(reading(), r=1, alpha=1, target_modules=["second", "last"])


def test_the_probe_leaves_nothing_in_a_networks_caches():
    config = {
        "model_type": "levit", "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    }  # fmt: skip
    backbone = build_backbone(framework="hf", pretrained=False, config=config, image_size=64)
    attach_lora(backbone, r=2, alpha=4)
    caches = [m.attention_bias_cache for m in backbone.modules() if hasattr(m, "attention_bias_cache")]
    assert caches
    assert not any(caches)
    x = images(backbone)
    with torch.no_grad():
        torch.testing.assert_close(merged(backbone)(x), backbone(x))
