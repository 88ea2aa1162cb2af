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


def test_later_products_are_checked_too():
    """A step that suits the first vector and not a later one is found out; the checks grow rare."""
    space, calls = VectorSpace.of({"x": torch.zeros(2, dtype=torch.float64)}), []

    def difference(v, step):  # curvature 1, and along the second axis an error that grows with the step
        calls.append(step)
        return v * (1 + step * torch.tensor([0.0, 1e4], dtype=torch.float64))

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
