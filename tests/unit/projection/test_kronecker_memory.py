"""The Kronecker penalty against dense formulas and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nostalgia import KroneckerMemory, kronecker_factors
from nostalgia.projection.kronecker_memory import nearest_pair
from tests.unit.curvature.test_kronecker import adapted, convolutional, data, forward, mlp

CASES = [(mlp, (4,)), (convolutional, (2, 4, 4)), (adapted, (4,))]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def remembered(
    make: Any, shape: tuple[int, ...], tasks: int = 2, **options: Any
) -> tuple[nn.Module, KroneckerMemory, list[Any], list[Any]]:
    """A memory of some tasks, the network some way after the last, the factors, and the last task's parameters."""
    model, memory, taken = make(), KroneckerMemory(3.0, **options), []
    for task in range(tasks):
        inputs, labels = data(5 + task, *shape)
        taken.append(kronecker_factors(model, forward, [(inputs * (task + 1), labels)], seed=task))
        memory.update(taken[-1], trained(model))
        reference = {name: p.detach().clone() for name, p in trained(model).items()}
        moved(model, task)
    return model, memory, taken, [reference]


def weight_changes(factors: Any, reference: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every weight and other parameter since ``reference``; that of an adapted weight under its layer's name."""
    changes = {name: now[name] - reference[name] for name in factors.diagonal}
    for layer in factors.layers:
        names = layer.parameters
        if layer.scaling is None:
            changes[names[0]] = now[names[0]] - reference[names[0]]
        else:
            products = (values[names[1]] @ values[names[0]] for values in (now, reference))
            changes[layer.name] = layer.scaling * (next(products) - next(products))
    return changes


def dense_penalty(taken: list[Any], reference: dict[str, Tensor], now: dict[str, Tensor]) -> Tensor:
    """1/2 sum_t sum_l vec(D)^T (G (x) A) vec(D) and the diagonals', with every matrix written out."""
    total = torch.zeros((), dtype=torch.float64)
    for factors in taken:
        changes = weight_changes(factors, reference, now)
        for layer in factors.layers:
            change = changes[layer.parameters[0] if layer.scaling is None else layer.name].flatten()
            total = total + 0.5 * change @ torch.kron(layer.outputs, layer.inputs) @ change
        for name, diagonal in factors.diagonal.items():
            total = total + 0.5 * (diagonal * changes[name].square()).sum()
    return total


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_penalty_and_gradient_are_those_of_the_dense_formula(make: Any, shape: tuple[int, ...]) -> None:
    model, memory, taken, (reference,) = remembered(make, shape)
    parameters = trained(model)
    expected = 3.0 * dense_penalty(taken, reference, parameters)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    torch.testing.assert_close(memory.penalty(parameters), expected, atol=1e-10, rtol=1e-10)
    changes = weight_changes(taken[-1], reference, parameters)
    torch.testing.assert_close(0.5 * 3.0 * memory.quadratic(changes), expected, atol=1e-10, rtol=1e-10)
    again = torch.autograd.grad(memory.penalty(parameters), list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    memory.add_gradients(parameters)
    for parameter, gradient, by_autograd in zip(parameters.values(), gradients, again, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad - 1, gradient, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(by_autograd, gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("change", ["update", "anchor", "load_state_dict"])
def test_gradients_after_a_change_are_those_of_a_new_memory(change: str) -> None:
    """What the gradients are computed from together does not outlive the terms and the reference point it was made of."""
    model, memory, _, _ = remembered(adapted, (4,))
    parameters = trained(model)
    memory.add_gradients(parameters)
    if change == "update":
        memory.update(kronecker_factors(model, forward, [data(7, 4)], seed=9), parameters)
        moved(model, 5)
    elif change == "anchor":
        memory.anchor(parameters)
        moved(model, 5)
    else:
        memory.load_state_dict(remembered(adapted, (4,), tasks=3)[1].state_dict())
    model.zero_grad()
    memory.add_gradients(parameters)
    expected = torch.autograd.grad(memory.penalty(parameters), list(parameters.values()))
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_strength_zero_leaves_gradients_untouched() -> None:
    model, memory, _, _ = remembered(mlp, (4,))
    memory.strength = 0.0
    for parameter in trained(model).values():
        parameter.grad = torch.full_like(parameter, 0.1)
    memory.add_gradients(trained(model))
    assert all(torch.equal(p.grad, torch.full_like(p, 0.1)) for p in trained(model).values())  # type: ignore[arg-type]


def test_at_the_reference_point_there_is_no_force() -> None:
    model, memory, _, _ = remembered(adapted, (4,))
    memory.anchor(trained(model))
    memory.add_gradients(trained(model))
    assert all(float(p.grad.abs().max()) < 1e-12 for p in trained(model).values())  # type: ignore[union-attr]


def test_the_nearest_pair_is_the_singular_vector_of_the_rearrangement() -> None:
    torch.manual_seed(0)
    inputs, outputs = (torch.stack([x @ x.T for x in torch.randn(3, n, n, dtype=torch.float64)]) for n in (4, 3))
    a, g, error, norm = nearest_pair(inputs, outputs)
    rearranged = sum(torch.outer(o.flatten(), i.flatten()) for o, i in zip(outputs, inputs, strict=True))
    left, values, right = torch.linalg.svd(rearranged)
    best = values[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(torch.outer(g[0].flatten(), a[0].flatten()), best, atol=1e-10, rtol=1e-10)
    assert error == pytest.approx(float(values[1:].square().sum()), rel=1e-8)
    assert norm == pytest.approx(float(values.square().sum()), rel=1e-10)
    assert float(torch.linalg.eigvalsh(a[0])[0]) > -1e-10
    assert float(torch.linalg.eigvalsh(g[0])[0]) > -1e-10


def test_beyond_the_budget_tasks_become_one_pair_and_it_is_said() -> None:
    model, _, taken, _ = remembered(mlp, (4,), tasks=1)
    memory = KroneckerMemory(1.0, budget_bytes=3 * taken[0].num_bytes // 2)
    first = memory.update(taken[0], trained(model))
    assert (first.merged, first.error) == (False, 0.0)
    second = memory.update(taken[0], trained(model))
    assert second.merged
    assert second.error < 1e-6  # the same factors twice are one pair
    assert all(len(layer.inputs) == 1 for layer in memory.layers.values())
    assert memory.num_bytes <= first.num_bytes


def test_state_goes_round() -> None:
    model, memory, _, _ = remembered(adapted, (4,))
    other = KroneckerMemory(3.0)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.penalty(trained(model)), memory.penalty(trained(model)))


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_factors_of_another_precision_hold_the_parameters_all_the_same(make: Any, shape: tuple[int, ...]) -> None:
    """`curvature.precision=float64` measures a network of float32."""
    model, memory = make().float(), KroneckerMemory(3.0)
    inputs, labels = data(5, *shape)
    for task in range(2):
        factors = kronecker_factors(model, forward, [(inputs.float(), labels)], seed=task, precision="float64")
        memory.update(factors, trained(model))
        moved(model.double(), task)
        model.float()
        memory.add_gradients(trained(model))
    expected = torch.autograd.grad(memory.penalty(trained(model)), list(trained(model).values()))
    model.zero_grad()
    memory.add_gradients(trained(model))
    for parameter, gradient in zip(trained(model).values(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)
