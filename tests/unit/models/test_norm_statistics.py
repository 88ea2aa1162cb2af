"""Batch-norm statistics: captured, put in for a while, frozen, averaged over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nostalgia.errors import NotFoundError
from nostalgia.models import norm_statistics
from tests.ranks import run_ranks
from tests.unit.models import cases
from tests.unit.models.tiny import images, resnet18, scratch


def train_once(backbone, seed: int) -> None:
    backbone.train()
    with torch.no_grad():
        backbone(images(backbone, batch=4, seed=seed) * 2 + 1)
    backbone.eval()


def test_statistics_of_a_task_bring_its_features_back():
    backbone = resnet18()
    x = images(backbone)
    train_once(backbone, seed=1)
    first, features = norm_statistics.capture(backbone), backbone(x)
    train_once(backbone, seed=2)
    drifted = backbone(x)
    assert not torch.allclose(drifted, features)
    with norm_statistics.using(backbone, first):
        assert torch.equal(backbone(x), features)
    assert torch.equal(backbone(x), drifted)
    with pytest.raises(ZeroDivisionError), norm_statistics.using(backbone, first):
        raise ZeroDivisionError
    assert torch.equal(backbone(x), drifted)
    with norm_statistics.using(backbone, None):
        assert torch.equal(backbone(x), drifted)
    norm_statistics.apply(backbone, first)
    assert torch.equal(backbone(x), features)


def test_statistics_are_measured_anew_from_given_images():
    """Of two batches the mean over both, whatever was there; a single image is left out, and frozen ones stay."""
    backbone, one, two = resnet18(), *(images(resnet18(), batch=4, seed=seed) for seed in (1, 2))
    train_once(backbone, seed=3)
    first = next(m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    handle = first.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].mean((0, 2, 3))))
    norm_statistics.measure_anew(backbone, [one, one[:1], two])
    handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(first.running_mean, torch.stack(seen).mean(0))
    assert first.momentum == 0.1
    assert not any(module.training for module in backbone.modules())
    norm_statistics.freeze(backbone)
    kept = norm_statistics.capture(backbone)
    norm_statistics.measure_anew(backbone, [two])
    assert all(torch.equal(kept[name], value) for name, value in norm_statistics.capture(backbone).items())


def test_statistics_measured_anew_do_not_wait_for_other_ranks(monkeypatch):
    """SyncBatchNorm's own forward, which would, is not called."""

    def waits(*arguments):
        raise AssertionError("a collective")

    backbone = resnet18()
    norm_statistics.synchronise(backbone)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in backbone.modules())
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", waits)
    norm_statistics.measure_anew(backbone, [images(backbone, batch=4)])
    assert not any("forward" in vars(m) for m in backbone.modules() if isinstance(m, torch.nn.SyncBatchNorm))


def test_captured_statistics_are_copies():
    backbone = resnet18()
    before = norm_statistics.capture(backbone)
    kept = {name: value.clone() for name, value in before.items()}
    train_once(backbone, seed=1)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert {name.rsplit(".", 1)[1] for name in kept} == {"running_mean", "running_var", "num_batches_tracked"}


def test_statistics_of_another_network_are_refused():
    with pytest.raises(NotFoundError, match="another network"):
        norm_statistics.apply(resnet18(), norm_statistics.capture(scratch("resnet")))


def test_frozen_statistics_stay_whatever_train_says():
    backbone = resnet18()
    before = norm_statistics.capture(backbone)
    norm_statistics.freeze(backbone)
    train_once(backbone, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in norm_statistics.capture(backbone).items())
    wrapper = torch.nn.Sequential(backbone).train()
    assert backbone.training
    assert not backbone.model.bn1.training
    norm_statistics.freeze(backbone, frozen=False)
    wrapper.train()
    assert backbone.model.bn1.training


def test_which_networks_have_statistics():
    assert norm_statistics.has_batch_norm(resnet18())
    assert not norm_statistics.has_batch_norm(scratch("vit"))
    assert norm_statistics.capture(scratch("vit")) == {}


def test_statistics_are_read_as_they_were_saved(tmp_path):
    backbone = resnet18()
    statistics = {"task1_a": norm_statistics.capture(backbone)}
    train_once(backbone, seed=1)
    statistics["task2_b"] = norm_statistics.capture(backbone)
    norm_statistics.save_statistics(statistics, tmp_path / "norm.safetensors")
    read = norm_statistics.load_statistics(tmp_path / "norm.safetensors")
    assert read.keys() == statistics.keys()
    for task, values in statistics.items():
        assert all(torch.equal(read[task][name], value) for name, value in values.items())
    with pytest.raises(NotFoundError, match="cannot be read"):
        norm_statistics.load_statistics(tmp_path / "nothing.safetensors")


def test_synchronised_layers_keep_parameters_and_features():
    backbone = resnet18()
    x = images(backbone)
    features, names = backbone(x), list(backbone.state_dict())
    weight = backbone.model.bn1.weight
    norm_statistics.synchronise(backbone)
    assert isinstance(backbone.model.bn1, torch.nn.SyncBatchNorm)
    assert backbone.model.bn1.weight is weight
    assert list(backbone.state_dict()) == names
    assert torch.equal(backbone(x), features)
    norm_statistics.freeze(backbone)
    assert not backbone.train().model.bn1.training


def test_synchronised_layers_are_probed_on_any_device():
    """As a resumed run on another number of GPUs does: their own forward pass refuses tensors that are on no GPU."""
    backbone = resnet18()
    norm_statistics.synchronise(backbone)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not backbone.draws_in_training()
        backbone.check_batch(2)
    finally:
        dist.destroy_process_group()


def test_the_average_over_ranks_is_that_of_the_batches_together():
    assert run_ranks(cases.check_average_over_ranks, world_size=2) == [True, True]
