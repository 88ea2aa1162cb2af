"""Layers that are not used as sum_t g x^T says have no Kronecker factors; those in windows have the same as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia import GGNOperator, kronecker_factors
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.curvature.rows import GradientRows

TOKENS, WIDTH = 8, 4


class Net(nn.Module):
    """Tokens (B, T, i) through the layer ``a``, then their mean to three classes."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.last = layer or nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.use = use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self.a, x).tanh().mean(dim=1))


class Standardized(nn.Linear):
    """As BiT's convolutions: the weight is normalised before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=1, keepdim=True)
        return F.linear(x, weight / weight.norm(dim=1, keepdim=True), self.bias)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def in_windows(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.reshape(len(x) * 4, 2, WIDTH)).reshape(x.shape)


def tokens_first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1)).transpose(0, 1)


def by_keyword(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(input=x)


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(layer(x).tanh())


def uncalled(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def of_positions(layer: nn.Module, x: Tensor) -> Tensor:
    table = torch.linspace(0, 1, TOKENS * WIDTH, dtype=x.dtype).view(1, TOKENS, WIDTH)
    return x * layer(table)


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=generator)
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def factors(model: nn.Module, **options: Any) -> KroneckerFactors:
    return kronecker_factors(model, forward, batches(**options), precision="float64", exact=True)


@pytest.mark.parametrize("use", [in_windows, tokens_first, by_keyword])
def test_the_factors_are_those_of_the_same_function_on_tokens(use: Callable[..., Tensor]) -> None:
    found, expected = factors(Net(use)), factors(Net(plain))
    for mine, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(mine.inputs, other.inputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine.outputs, other.outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "net",
    [
        lambda: Net(twice),
        lambda: Net(uncalled),
        lambda: Net(of_positions),
        lambda: Net(plain, Standardized(WIDTH, WIDTH)),
    ],
)
def test_other_uses_of_a_weight_have_the_diagonal_of_single_samples(net: Callable[[], Net], count: int) -> None:
    model = net()
    found = factors(model, count=count)
    assert [layer.name for layer in found.layers] == ["last"]
    operator = GGNOperator(model, forward, batches(), {"a.weight": model.a.weight}, precision="float64")
    eye = torch.eye(operator.space.size, dtype=torch.float64)
    exact = torch.stack([operator.matvec(row) for row in eye]).diagonal()
    torch.testing.assert_close(found.diagonal["a.weight"].flatten(), exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("use", [in_windows, tokens_first, twice, uncalled, of_positions])
def test_rows_are_the_gradients_of_single_samples(use: Callable[..., Tensor]) -> None:
    model = Net(use)
    rows = torch.cat([block.clone() for block in GradientRows(model, forward, batches(), precision="float64", draws=3)])
    operator = GGNOperator(model, forward, batches(), precision="float64")
    eye = torch.eye(operator.space.size, dtype=torch.float64)
    exact = torch.stack([operator.matvec(row) for row in eye])
    torch.testing.assert_close(rows.T @ rows / 6, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_a_convolution_padded_to_the_same_size(size: int) -> None:
    """Its factors are those of the layer that is given the padded image."""

    def model(layer: nn.Conv2d, pads: tuple[int, ...]) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.ZeroPad2d(pads), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
        net(torch.zeros(1, 2, 5, 5, dtype=torch.float64))
        nn.init.constant_(layer.weight, 0.1)
        nn.init.eye_(net[4].weight)
        return net

    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    pads = ((size - 1) // 2, size - 1 - (size - 1) // 2) * 2
    same = model(nn.Conv2d(2, 3, size, padding="same", bias=False), (0, 0, 0, 0))
    numbers = model(nn.Conv2d(2, 3, size, bias=False), pads)
    found, expected = (
        kronecker_factors(net, forward, [(x, y)], {"1.weight": net[1].weight}, precision="float64", exact=True)  # type: ignore[index]
        for net in (same, numbers)
    )
    torch.testing.assert_close(found.layers[0].inputs, expected.layers[0].inputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.layers[0].outputs, expected.layers[0].outputs, rtol=0, atol=1e-12)
