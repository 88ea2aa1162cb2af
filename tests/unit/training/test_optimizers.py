"""Every optimizer that a run can choose: made with its own options, refused where it cannot work, Lion's formula."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW

from nostalgia.config import parse
from nostalgia.config.schema import TrainConfig
from nostalgia.errors import UsageError
from nostalgia.experiment.phases import optimization
from nostalgia.training.loop import Optimization, make_scheduler
from nostalgia.training.optimizers import OPTIMIZERS, Lion, check_optimizer, make_optimizer


def test_the_configuration_offers_those_that_are_made() -> None:
    (choices,) = (item.metadata["choices"] for item in fields(TrainConfig) if item.name == "optimizer")
    assert set(choices) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("adamw", AdamW, {"betas": (0.8, 0.95)}),
        ("sgd", SGD, {"momentum": 0.7}),
        ("lion", Lion, {"betas": (0.8, 0.95)}),
        ("adafactor", Adafactor, {}),
    ],
)
def test_each_is_made_with_its_options_over_what_is_trained(name: str, kind: type, expected: dict) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    options = Optimization(epochs=1, lr=0.01, weight_decay=0.02, betas=(0.8, 0.95), momentum=0.7)
    optimizer = make_optimizer(model, name, vars(options))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["params"] == list(model[1].parameters())
    assert {key: group[key] for key in ("lr", "weight_decay", *expected)} == {
        "lr": 0.01, "weight_decay": 0.02, **expected
    }  # fmt: skip
    model(torch.ones(2, 3)).square().sum().backward()
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_heads_have_a_rate_of_their_own(name: str) -> None:
    """It falls and rises with the backbone's."""
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "heads": nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])})
    model["backbone"].bias.requires_grad_(False)
    options = Optimization(epochs=1, lr=0.01, head_lr=0.5, warmup_epochs=0)
    optimizer = make_optimizer(model, name, vars(options))
    backbone, heads = optimizer.param_groups
    assert backbone["params"] == [model["backbone"].weight]
    assert heads["params"] == list(model["heads"].parameters())
    scheduler = make_scheduler(optimizer, options, 4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert (backbone["lr"], heads["lr"]) == pytest.approx((0.005, 0.25))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (1e-4, 1e-4, 1e-4)),
        (["train.head_lr=1e-2"], (1e-4, 1e-2, 1e-2)),
        (["train.head_lr=1e-2", "train.head_warmup_lr=1e-3"], (1e-4, 1e-2, 1e-3)),
    ],
)
def test_the_rate_of_heads_and_of_their_warm_up(words: list[str], expected: tuple[float, float, float]) -> None:
    config = parse(["dataset=digits", "train.lr=1e-4", *words]).config
    together, alone = optimization(config, 3), optimization(config, 3, head_only=True)
    assert (together.lr, together.head_lr, alone.head_lr) == expected


def test_lion_is_its_formula() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.3)
    theta, m = parameter.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        g = torch.randn(5, dtype=torch.float64)
        parameter.grad = g.clone()
        optimizer.step()
        theta = (1 - 0.1 * 0.3) * theta - 0.1 * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
        torch.testing.assert_close(parameter.detach(), theta, rtol=0, atol=1e-14)


def test_those_without_a_metric_and_without_shards_are_refused() -> None:
    for name in ("adamw", "sgd", "lion"):
        check_optimizer(name, needs_metric=True, sharded=True)
    check_optimizer("adafactor")
    with pytest.raises(UsageError, match="its metric is not known; allowed are adamw, sgd, lion"):
        check_optimizer("adafactor", needs_metric=True)
    with pytest.raises(UsageError, match="with FSDP2: it needs whole matrices; allowed are adamw, sgd, lion"):
        check_optimizer("adafactor", sharded=True)
