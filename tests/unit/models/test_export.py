"""Exported models are opened by the libraries' own tools and give the run's features."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torchvision
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from nostalgia.models import attach_lora, build_backbone, load_heads, make_head, norm_statistics
from nostalgia.models.export import export
from nostalgia.models.exported import load_export
from nostalgia.models.model_card import TaskCard, code, escape
from tests.unit.models.tiny import images, resnet18, scratch, shake

TASKS = [
    TaskCard("task1_digits", ["zero", "one"], accuracy=0.91, learning_accuracy=0.95),
    TaskCard("task2_odd|names", ["a|b", "<script>", "*c*", "`d`", "e\nf"], accuracy=None),
]


def write(folder, backbone, **words):
    heads = {task.name: make_head(backbone.feature_dim, len(task.classes), seed=0) for task in TASKS}
    words = {"command": "python -m nostalgia.train", "method": "nostalgia", "tasks": TASKS, **words}
    return export(folder, backbone=backbone, heads=heads, **words), heads


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "convnext", "dinov2", "resnet"])
def test_a_hugging_face_backbone_comes_back(tmp_path, kind):
    backbone = scratch(kind)
    shake(backbone)
    folder, _ = write(tmp_path / "export", backbone)
    again = build_backbone(framework="hf", model_id=str(folder / "backbone"))
    assert (again.image_size, again.mean, again.std) == (backbone.image_size, backbone.mean, backbone.std)
    x = images(backbone)
    with torch.no_grad():
        torch.testing.assert_close(again(x), backbone(x), rtol=0, atol=1e-6)
        plain = AutoModel.from_pretrained(folder / "backbone")(pixel_values=x)
        torch.testing.assert_close(backbone.features(plain), backbone(x), rtol=0, atol=1e-6)
    assert AutoImageProcessor.from_pretrained(folder / "backbone").image_mean == backbone.mean


@pytest.mark.parametrize("make", [lambda: scratch("vit"), lambda: scratch("swinv2"), lambda: scratch("resnet")])
def test_adapters_are_a_peft_folder_on_their_base(tmp_path, make):
    backbone = make()
    attach_lora(backbone, r=2, alpha=8, dropout=0.1)
    shake(backbone)
    folder, _ = write(tmp_path / "export", backbone, model_id="google/vit-base-patch16-224")
    x = images(backbone)
    base = AutoModel.from_pretrained(folder / "backbone").eval()
    model = PeftModel.from_pretrained(base, folder / "adapters").eval()
    again = build_backbone(framework="hf", model_id=str(folder / "backbone_merged"))
    with torch.no_grad():
        expected = backbone(x)
        torch.testing.assert_close(backbone.features(model(pixel_values=x)), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    settings = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "google/vit-base-patch16-224"
    assert (settings["r"], settings["lora_alpha"]) == (2, 8)


def test_a_torchvision_backbone_comes_back_with_its_normalisation(tmp_path):
    backbone = resnet18()
    shake(backbone)
    folder, _ = write(tmp_path / "export", backbone)
    file = folder / "backbone" / "model.safetensors"
    again = build_backbone(framework="torchvision", model_id=str(file))
    assert (again.arch, again.image_size, again.mean) == ("resnet18", 32, (0.5, 0.5, 0.5))
    with torch.no_grad():
        torch.testing.assert_close(again(images(backbone)), backbone(images(backbone)), rtol=0, atol=1e-6)
    import torchvision

    network = torchvision.models.resnet18()
    missing = network.load_state_dict(load_file(file), strict=False).missing_keys
    assert missing == ["fc.weight", "fc.bias"]


def test_adapters_on_a_torchvision_backbone(tmp_path):
    backbone = resnet18()
    attach_lora(backbone, r=2, alpha=4)
    shake(backbone)
    folder, _ = write(tmp_path / "export", backbone)
    base, merged = (
        build_backbone(framework="torchvision", model_id=str(folder / name / "model.safetensors"))
        for name in ("backbone", "backbone_merged")
    )
    model = PeftModel.from_pretrained(base.model, folder / "adapters").eval()
    x = images(backbone)
    with torch.no_grad():
        torch.testing.assert_close(model(x), backbone(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(merged(x), backbone(x), rtol=1e-4, atol=1e-4)


def test_heads_classes_and_statistics_come_back(tmp_path):
    backbone = resnet18()
    statistics = {task.name: norm_statistics.capture(backbone) for task in TASKS}
    folder, heads = write(tmp_path / "export", backbone, norm_statistics=statistics)
    read = load_heads(folder / "heads.safetensors")
    assert all(torch.equal(read[name].weight, head.weight) for name, head in heads.items())
    classes = json.loads((folder / "classes.json").read_text())
    assert classes == {task.name: list(task.classes) for task in TASKS}
    loaded = load_export(folder, framework="torchvision").norm_statistics
    norm_statistics.apply(backbone, loaded["task1_digits"])
    assert loaded.keys() == statistics.keys()


def test_a_task_s_statistics_go_into_the_network_as_the_card_says(tmp_path):
    """By torchvision alone: the exported network's own names."""
    backbone = resnet18()
    anew = {name: value + 1 for name, value in norm_statistics.capture(backbone).items()}
    folder, _ = write(tmp_path / "export", backbone, norm_statistics={"task1_digits": anew})
    network = torchvision.models.resnet18()
    network.load_state_dict(load_file(folder / "backbone" / "model.safetensors"), strict=False)
    own = {
        name.removeprefix("task1_digits/"): value
        for name, value in load_file(folder / "norm_statistics.safetensors").items()
    }
    assert network.load_state_dict(own, strict=False).unexpected_keys == []
    assert torch.equal(network.bn1.running_mean, anew["model.bn1.running_mean"])


def test_what_was_done_to_a_task_s_images_is_said(tmp_path):
    tasks = [TASKS[0], TaskCard("task2_digits", ["a, b", "c"], accuracy=0.5, transform=("invert", "rotate90"))]
    folder, _ = write(tmp_path / "export", resnet18(), tasks=tasks)
    card = (folder / "README.md").read_text()
    assert r"| task2\_digits | 2 |  | 0.5000 | invert, rotate90 |" in card
    assert '"a, b", c' in card
    transforms = json.loads((folder / "transforms.json").read_text())
    assert transforms == {"task1_digits": [], "task2_digits": ["invert", "rotate90"]}


@pytest.mark.parametrize("shared", [True, False])
def test_the_card_says_whether_tasks_share_a_head(tmp_path, shared):
    backbone = resnet18()
    head = make_head(backbone.feature_dim, 5, seed=0)
    other = head if shared else make_head(backbone.feature_dim, 5, seed=1)
    heads = {task.name: one for task, one in zip(TASKS, (head, other), strict=True)}
    folder = export(tmp_path / "export", backbone=backbone, heads=heads, tasks=TASKS, command="x", method="lwf")
    card = (folder / "README.md").read_text()
    assert ("share one head" in card, "has its own head" in card) == (shared, not shared)
    assert len(load_file(folder / "heads.safetensors")) == 4


def test_the_card_says_what_it_is_and_shows_odd_text_as_it_is(tmp_path):
    command = "python -m nostalgia.train 'name=```x' \\\n  <b>"
    folder, _ = write(tmp_path / "export", scratch("vit"), command=command)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert r"| task1\_digits | 2 | 0.9500 | 0.9100 |" in card
    assert r"| task2\_odd\|names | 5 |  |  |" in card
    assert r"a\|b, \<script\>, \*c\*, \`d\`, e f" in card
    fence = re.search(r"^(`{3,})\n" + re.escape(command) + r"\n\1$", card, re.M)
    assert fence is not None
    assert len(fence.group(1)) == 4
    assert "<script>" not in card.replace(r"\<script\>", "")


def test_escaping():
    assert escape("a_b") == r"a\_b"
    assert escape("two\n lines") == "two lines"
    assert code("x").splitlines() == ["```", "x", "```"]


def test_an_export_takes_the_place_of_one_that_is_there_and_leaves_nothing_else(tmp_path):
    folder, _ = write(tmp_path / "export", scratch("vit"))
    (folder / "stale").write_text("")
    for left in (".export.tmp", ".export.old"):  # by a process that was killed
        (tmp_path / left / "backbone").mkdir(parents=True)
    write(tmp_path / "export", scratch("vit", seed=1))
    assert not (folder / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    folder, _ = write(tmp_path / "export", scratch("vit"))
    before = (folder / "README.md").read_text()

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("nostalgia.models.export.save_heads", fails)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "export", scratch("vit", seed=1), command="other")
    assert (folder / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_with_adapters_on_convolutions_loads_again(tmp_path):
    """MobileNetV2 reads its convolutions' strides, which PEFT's layers do not have."""
    backbone = scratch("mobilenet_v2")
    attach_lora(backbone, r=2, alpha=8)
    shake(backbone)
    folder, _ = write(tmp_path / "export", backbone)
    again = load_export(folder, framework="hf").backbone
    with torch.no_grad():
        torch.testing.assert_close(again(images(backbone)), backbone.eval()(images(backbone)), rtol=1e-5, atol=1e-6)
