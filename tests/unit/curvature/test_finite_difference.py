"""Finite differences: near the exact product where they can be, refused where they are noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nostalgia.curvature import HessianOperator
from nostalgia.curvature.finite_difference import TOLERANCE, CentralDifferences
from nostalgia.errors import RunFailedError
from nostalgia.linalg.vector_space import VectorSpace
from tests.unit.curvature.networks import NETWORKS, batches, loss_fn, mlp, relative, vectors


@pytest.mark.parametrize("kind", ["mlp", "vit", "vit_lora"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 5e-3)])
def test_near_the_exact_product(kind, dtype, error):
    model, data = NETWORKS[kind]().to(dtype), batches(kind)
    exact = HessianOperator(model, loss_fn, data, precision="float64")
    operator = HessianOperator(model, loss_fn, data, method="finite_difference")
    assert operator.estimated_error is None
    for v in vectors(operator.size):
        found = operator.matvec(v.to(dtype))
        assert relative(found, exact.matvec(v)) < error
        # The step has a length of its own, whatever the vector's.
        assert relative(operator.matvec(1e3 * v.to(dtype)), 1e3 * found.double()) < error
    assert operator.estimated_error is not None
    assert operator.estimated_error < error
    assert not operator.matvec(torch.zeros_like(found)).any()
    assert relative(operator.gradient(), exact.gradient()) < 1e-4
    assert operator.loss() == pytest.approx(exact.loss(), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_noise_is_refused(precision):
    """bfloat16 rounds the difference away; a comb of kinks has no second derivative at the step's scale."""

    def kinked(model, batch):
        loss, samples = loss_fn(model, batch)
        return loss + (1e4 * model[0].weight).abs().frac().sub(0.5).abs().sum() / 1e2, samples

    function = kinked if precision == "float32" else loss_fn
    model = mlp().float()
    operator = HessianOperator(model, function, batches("mlp"), method="finite_difference", precision=precision)
    with pytest.raises(RunFailedError, match="finite-difference curvature is noise: product 1 changes by") as caught:
        operator.matvec(operator.space.randn(0))
    assert caught.value.exit_code == 4
    assert operator.estimated_error > TOLERANCE


def test_a_step_too_short_for_one_vector_stays_for_the_others():
    """Along the second axis it is lost in rounding; along the first only a short one will do."""
    space = VectorSpace.of({"x": torch.zeros(2)})

    def difference(v, step):
        return v * (1 + torch.tensor([1e3 * step, 1e-6 / step]))

    differences, (first, second) = CentralDifferences(space, 1.0), torch.eye(2)
    differences.product(first, difference)
    short = differences.step
    for v in (second, first, second):
        assert relative(differences.product(v, difference), v) < TOLERANCE
    assert differences.step == short
    assert differences.estimated_error < TOLERANCE


def test_a_difference_that_rounds_away_is_not_a_product_of_zero():
    space = VectorSpace.of({"x": torch.zeros(2)})

    def difference(v, step):  # noise, until the step is lost in the parameters
        return v * (1 + 1 / step if step > 1e-4 else 0.0)

    with pytest.raises(RunFailedError, match="noise"):
        CentralDifferences(space, 1.0).product(torch.ones(2), difference)


def test_later_products_are_checked_too():
    """A step that suits the first vector and not a later one is found out; the checks grow rare."""
    space, calls = VectorSpace.of({"x": torch.zeros(2, dtype=torch.float64)}), []

    def difference(v, step):  # curvature 1, and along the second axis an error that grows with the step
        calls.append(step)
        return v * (1 + step * torch.tensor([0.0, 1e9], dtype=torch.float64))

    differences = CentralDifferences(space, 1.0)
    first, second = torch.eye(2, dtype=torch.float64)
    assert not differences.product(torch.zeros(2, dtype=torch.float64), difference).any()
    assert calls == []
    differences.product(first, difference)
    chosen = len(calls)
    for _ in range(62):
        differences.product(first, difference)
    assert len(calls) - chosen == 62 + 5  # the 2nd, 4th, 8th, 16th, 32nd
    with pytest.raises(RunFailedError, match="product 64"):
        differences.product(second, difference)


@pytest.mark.parametrize(("dtype", "stiffness"), [(torch.float32, 5e3), (torch.float64, 5e4)])
def test_a_step_too_long_for_a_later_vector_is_shortened(dtype, stiffness):
    """The first, random vector hardly curves; along a stiff axis the loss bends within a thousandth of |theta|."""
    model = nn.Linear(2, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0]]))

    def stiff(network, batch):
        along, across = network(batch)[:, 0]
        return 1e-2 * (stiffness * along).cosh().log() + across.square(), 1

    data = [torch.eye(2, dtype=dtype)]
    exact = HessianOperator(model, stiff, data, precision="float64")
    operator = HessianOperator(model, stiff, data, method="finite_difference")
    for v in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5])):
        assert relative(operator.matvec(v.to(dtype)), exact.matvec(v.double())) < TOLERANCE


def test_two_passes_a_product_once_the_step_is_known():
    calls = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            calls.append(len(x))
            return self.inner(x)

    operator = HessianOperator(Counted(), loss_fn, batches("mlp"), method="finite_difference")
    v = next(vectors(43))
    for _ in range(2):
        operator.matvec(v)
    calls.clear()
    operator.matvec(v)
    assert calls == [5, 5, 2, 2]
