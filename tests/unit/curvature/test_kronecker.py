"""Kronecker factors against dense Gauss-Newton matrices, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from nostalgia import GGNOperator, kronecker_factors
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.errors import UsageError

TOLERANCE = 1e-10


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def data(samples: int, *shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (samples,), generator=generator)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 3)).double()


def adapted() -> nn.Module:
    model = mlp().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0", "3"]), model)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    return model.double()


def dense(operator: Any) -> Tensor:
    """The matrix (P, P) of an operator."""
    eye = torch.eye(operator.space.size, dtype=torch.float64)
    return torch.stack([operator.matvec(row) for row in eye])


def block_of(matrix: Tensor, operator: Any, name: str) -> Tensor:
    start = operator.space.layout.offsets[operator.space.names.index(name)]
    stop = start + operator.space.layout.numels[operator.space.names.index(name)]
    return matrix[start:stop, start:stop]


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (convolutional, (2, 1, 1))])
def test_of_one_sample_without_sharing_each_layer_is_its_gauss_newton_block(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """A convolution over one pixel shares nothing: its one patch is the sample's."""
    torch.manual_seed(0)
    model = (
        make() if make is mlp else nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3)).double()
    )
    batches = [data(1, *shape)]
    factors = kronecker_factors(model, forward, batches, exact=True)
    expected = GGNOperator(model, forward, batches)
    ours, theirs = dense(factors), dense(expected)
    for name, parameter in model.named_parameters():
        mine, its = block_of(ours, factors, name), block_of(theirs, expected, name)
        if parameter.dim() == 1:
            mine, its = mine.diagonal(), its.diagonal()
        torch.testing.assert_close(mine, its, atol=TOLERANCE, rtol=TOLERANCE)


def test_of_a_linear_network_with_squared_loss_it_is_the_whole_matrix() -> None:
    model, batches = nn.Linear(4, 3, bias=False).double(), [data(5, 4), data(2, 4)]
    regression = [(inputs, torch.zeros(len(inputs), 3, dtype=torch.float64)) for inputs, _ in batches]
    factors = kronecker_factors(model, forward, regression, exact=True, loss="mse")
    torch.testing.assert_close(dense(factors), dense(GGNOperator(model, forward, regression, loss="mse")))


def test_diagonals_of_other_parameters_are_exact_for_many_samples() -> None:
    model, batches = mlp(), [data(5, 4)]
    factors, expected = kronecker_factors(model, forward, batches, exact=True), GGNOperator(model, forward, batches)
    diagonal = expected.space.gather(dense(expected).diagonal())
    for name, values in zip(expected.space.names, diagonal, strict=True):
        if name in factors.diagonal:
            torch.testing.assert_close(factors.diagonal[name], values, atol=TOLERANCE, rtol=TOLERANCE)
    assert set(factors.diagonal) == {"0.bias", "2.weight", "2.bias", "3.bias"}


def test_an_adapters_block_is_the_layers_seen_through_b_and_a() -> None:
    model, batches = adapted(), [data(6, 4)]
    factors = kronecker_factors(model, forward, batches, exact=True)
    ours = dense(factors)
    for layer in factors.layers:
        name_a, name_b = layer.parameters
        a, b = (dict(model.named_parameters())[name].detach() for name in layer.parameters)

        def change(a: Tensor, b: Tensor, scaling: float = layer.scaling or 0.0) -> Tensor:
            return (scaling * b @ a).flatten()

        through_a, through_b = torch.autograd.functional.jacobian(change, (a, b))
        jacobian = torch.cat([through_a.flatten(1), through_b.flatten(1)], dim=1)
        expected = jacobian.T @ torch.kron(layer.outputs, layer.inputs) @ jacobian
        rows = torch.cat(
            [torch.arange(factors.size).split(factors.space.layout.numels)[i] for i in _places(factors, name_a, name_b)]
        )
        torch.testing.assert_close(ours[rows][:, rows], expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert factors.trace() == pytest.approx(float(ours.trace()), rel=1e-10)


def _places(factors: KroneckerFactors, *names: str) -> list[int]:
    return [factors.space.names.index(name) for name in names]


def test_the_factors_of_an_adapted_layer_are_those_of_its_weight() -> None:
    model = adapted()
    of_adapters = kronecker_factors(model, forward, [data(6, 4)], seed=2)
    for layer in of_adapters.layers:
        weight = dict(model.named_parameters())[f"{layer.name}.base_layer.weight"].requires_grad_()
        alone = kronecker_factors(model, forward, [data(6, 4)], {"w": weight}, seed=2)
        torch.testing.assert_close(alone.layers[0].inputs, layer.inputs)
        torch.testing.assert_close(alone.layers[0].outputs, layer.outputs)
        weight.requires_grad_(False)


def test_batches_do_not_matter_and_the_model_is_left_alone() -> None:
    model, (inputs, labels) = convolutional().train(), data(7, 2, 4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = kronecker_factors(model, forward, [(inputs, labels)], seed=5)
    cut = kronecker_factors(model, forward, [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])], seed=5)
    for one, two in zip(whole.layers, cut.layers, strict=True):
        torch.testing.assert_close(one.outputs, two.outputs, atol=1e-13, rtol=1e-12)
        torch.testing.assert_close(one.inputs, two.inputs, atol=1e-13, rtol=1e-12)
    assert not torch.allclose(
        kronecker_factors(model, forward, [(inputs, labels)], seed=6).layers[0].outputs, whole.layers[0].outputs
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_error_of_drawn_cotangents_falls_as_the_root_of_their_number() -> None:
    model, batches = mlp(), [data(6, 4)]
    exact = kronecker_factors(model, forward, batches, exact=True).layers[0].outputs

    def error(draws: int) -> float:
        errors = [
            (kronecker_factors(model, forward, batches, draws=draws, seed=seed).layers[0].outputs - exact).norm() ** 2
            for seed in range(40)
        ]
        return float(torch.stack(errors).mean().sqrt() / exact.norm())

    assert error(64) == pytest.approx(error(4) / 4, rel=0.3)


def test_the_temperature_keeps_fitted_samples_alive() -> None:
    model, batches = mlp(), [data(6, 4)]
    with torch.no_grad():
        model[3].weight *= 200
    cold, warm = (kronecker_factors(model, forward, batches, exact=True, temperature=t).trace() for t in (1.0, 50.0))
    assert warm > 10 * cold


def test_wrong_use_is_refused() -> None:
    for words, message in (
        ({"draws": 0}, "draws >= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"loss": "hinge"}, "cross_entropy or mse"),
    ):
        with pytest.raises(UsageError, match=message):
            kronecker_factors(mlp(), forward, [data(2, 4)], **words)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no samples"):
        kronecker_factors(mlp(), forward, [])
