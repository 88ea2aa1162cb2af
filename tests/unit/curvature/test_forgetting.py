"""Predicted forgetting against dense float64 oracles: exact for a quadratic loss, term by term for a network."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nostalgia.curvature import HessianOperator
from nostalgia.curvature.forgetting import ForgettingPrediction
from nostalgia.curvature.kronecker import kronecker_factors
from nostalgia.curvature.shares import parameter_shares
from nostalgia.curvature.trace import trace_outside
from nostalgia.linalg.lanczos import lanczos
from tests.unit.curvature.networks import Oracle, batches, loss_fn, mlp

Batch = tuple[Tensor, Tensor]


def squares(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    inputs, targets = batch
    return (model(inputs)[:, 0] - targets).square().sum(), len(targets)


def quadratic(curvatures: list[float]) -> tuple[nn.Module, list[Batch], Tensor]:
    """A linear model with squared error whose Hessian has the eigenvalues given; and that Hessian (P, P)."""
    size = len(curvatures)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    # H = 2/N X^T X, with N = P rows
    inputs = (torch.tensor(curvatures, dtype=torch.float64) * size / 2).sqrt()[:, None] * rotation
    model = nn.Linear(size, 1, bias=False).double()
    data = [(inputs[:3], torch.ones(3).double()), (inputs[3:], -torch.ones(size - 3).double())]
    return model, data, 2 * inputs.T @ inputs / size


def finished(model: nn.Module, operator: HessianOperator, k: int, samples: int = 8) -> ForgettingPrediction:
    pairs = lanczos(operator, k, tol=1e-10, max_products=500)
    prediction = ForgettingPrediction(operator.space, {"one": pairs.eigenvectors}, trace_samples=samples)
    prediction.finish("one", operator, pairs)
    return prediction


def moved(model: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


@pytest.mark.parametrize("k", [2, 6])
def test_exact_for_a_quadratic_loss_with_an_even_rest(k: int) -> None:
    """All curvature in k pairs, or the rest the same in all directions: the increase itself, at any distance."""
    model, data, _ = quadratic([9.0, 5.0, 0.5, 0.5, 0.5, 0.5])
    operator = HessianOperator(model, squares, data)
    prediction = finished(model, operator, k, samples=200 if k == 2 else 1)
    for seed in range(3):
        other = moved(model, seed, scale=10.0**seed)
        now = HessianOperator(other, squares, data)
        (row,) = prediction.measure("two", now.space.take(other.parameters()), lambda _, now=now: now.loss())
        sampling = 0.5 * (prediction.expansions["one"].rest_error or 0.0) / 4 * row.displacement_outside**2
        assert row.predicted == pytest.approx(row.measured, rel=1e-9, abs=4 * sampling if k == 2 else 0.0)
        assert sampling < 0.05 * row.predicted
        assert row.task == "one"
        assert row.after == "two"


@pytest.mark.parametrize("with_pairs", [False, True])
def test_kronecker_factors_are_exact_for_a_linear_network_with_squared_error(with_pairs: bool) -> None:
    """The layer's curvature is 2 I (x) A: linear + kronecker is the whole increase, at any distance."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    data = [(torch.randn(n, 5).double(), torch.randn(n, 3).double()) for n in (4, 7)]

    def squared(m: nn.Module, b: Batch) -> tuple[Tensor, int]:
        return (m(b[0]) - b[1]).square().sum(), len(b[1])

    operator = HessianOperator(model, squared, data)
    factors = kronecker_factors(
        model, lambda m, b: (m(b[0]), b[1]), data, loss="mse", exact=True, precision="float64", space=operator.space
    )
    pairs = lanczos(operator, 2, tol=1e-10, max_products=500) if with_pairs else None
    bases = {"one": pairs.eigenvectors} if pairs is not None else {}
    prediction = ForgettingPrediction(operator.space, bases, {"one": factors})
    prediction.finish("one", operator, pairs)
    other = moved(model, 1, scale=10.0)
    now = HessianOperator(other, squared, data)
    (row,) = prediction.measure("two", now.space.take(other.parameters()), lambda _: now.loss())
    assert row.predicted == pytest.approx(row.measured, rel=1e-10)
    assert row.kronecker == pytest.approx(row.measured - row.linear, rel=1e-10)
    report = prediction.report()
    assert report["explained"] == pytest.approx(1.0, rel=1e-10)
    assert report["within_factor_1.5"] == 1.0
    again = ForgettingPrediction(operator.space, bases, {"one": factors}, prediction.vectors)
    again.load_state(json.loads(json.dumps(prediction.state())))
    assert again.rows == prediction.rows


def test_terms_equal_the_dense_ones_for_a_network() -> None:
    model, data, k = mlp(), batches("mlp", (5, 2)), 4
    oracle = Oracle(copy.deepcopy(model), [name for name, _ in model.named_parameters()], data)
    values, vectors = torch.linalg.eigh(oracle.hessian())
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    operator = HessianOperator(model, loss_fn, data)
    prediction = finished(model, operator, k, samples=64)
    rest = float(oracle.hessian().trace() - values.sum())
    expansion = prediction.expansions["one"]
    assert expansion.rest == pytest.approx(rest, abs=4 * expansion.rest_error)
    assert expansion.gradient_norm == pytest.approx(float(oracle.gradient().norm()), rel=1e-12)
    assert expansion.loss == pytest.approx(oracle.loss(), rel=1e-12)
    theta = torch.cat([p.detach().reshape(-1) for p in moved(model, 1, 0.1).parameters()])
    d = theta - oracle.theta
    (row,) = prediction.measure("two", theta, lambda _: float(oracle.mean_loss(theta)))
    inside = vectors.T @ d
    outside = float(d @ d - inside @ inside)
    assert row.linear == pytest.approx(float(oracle.gradient() @ d), rel=1e-9)
    assert row.inside == pytest.approx(float(0.5 * values @ inside**2), rel=1e-9)
    assert row.outside == pytest.approx(0.5 * expansion.rest / (len(d) - k) * outside, rel=1e-9)
    assert row.bound == pytest.approx(float(0.5 * values[-1]) * outside, rel=1e-9)
    assert row.predicted == row.linear + row.inside + row.outside
    assert row.measured == pytest.approx(float(oracle.mean_loss(theta)) - oracle.loss(), rel=1e-9)
    assert row.exact is None
    form = lambda task, end, d: float(d @ operator.matvec(d))  # noqa: E731
    (row,) = prediction.measure("two", theta, lambda _: row.measured + oracle.loss(), form)
    assert row.exact == pytest.approx(float(0.5 * d @ oracle.hessian() @ d), rel=1e-9)
    assert prediction.report()["explained_exactly"] == pytest.approx((row.linear + row.exact) / row.measured, rel=1e-6)


def test_the_bound_bounds_what_second_order_can_add_outside() -> None:
    model, data = mlp(), batches("mlp", (5, 2))
    oracle = Oracle(copy.deepcopy(model), [name for name, _ in model.named_parameters()], data)
    hessian = oracle.hessian()
    vectors = torch.linalg.eigh(hessian)[1].flip(1)[:, :4]
    prediction = finished(model, HessianOperator(model, loss_fn, data), 4)
    worst = vectors.new_zeros(len(hessian))
    worst += torch.linalg.eigh(hessian)[1].flip(1)[:, 4]  # the direction that comes closest
    for d in (worst, *torch.randn(20, len(hessian), generator=torch.Generator().manual_seed(0)).double()):
        row = prediction.predict("one", "two", oracle.theta + d, oracle.loss())
        out = d - vectors @ (vectors.T @ d)
        assert float(0.5 * out @ hessian @ out) <= row.bound * (1 + 1e-9)


def test_a_step_outside_the_span_leaves_nothing_inside() -> None:
    model, data = mlp(), batches("mlp", (5, 2))
    operator = HessianOperator(model, loss_fn, data)
    prediction = finished(model, operator, 4)
    basis = prediction.bases["one"]
    d = operator.space.randn(3)
    d -= basis.T @ (basis @ d)
    row = prediction.predict("one", "two", operator.space.take(model.parameters()) + d, operator.loss())
    assert row.inside < 1e-20
    assert row.displacement_outside == pytest.approx(row.displacement, rel=1e-12)


def test_a_trace_that_the_solve_gave_takes_no_products() -> None:
    model, data, hessian = quadratic([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    operator = HessianOperator(model, squares, data)
    pairs = replace(lanczos(operator, 2, tol=1e-10), trace=float(hessian.trace()))
    operator.matvec = None  # type: ignore[method-assign, assignment]
    expansion = ForgettingPrediction(operator.space, {"one": pairs.eigenvectors}).finish("one", operator, pairs)
    assert expansion.rest == pytest.approx(3.0 + 1.0 + 0.5 + 0.1)
    assert (expansion.trace, expansion.rest_error) == (pytest.approx(float(hessian.trace())), None)


def test_pairs_that_did_not_converge_are_left_to_the_rest() -> None:
    model, data, hessian = quadratic([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    operator = HessianOperator(model, squares, data)
    pairs = lanczos(operator, 3, tol=1e-10)
    pairs.converged[1] = False
    prediction = ForgettingPrediction(operator.space, {"one": pairs.eigenvectors}, trace_samples=300)
    expansion = prediction.finish("one", operator, pairs)
    assert expansion.kept == [0, 2]
    assert expansion.rest == pytest.approx(5.0 + 1.0 + 0.5 + 0.1, abs=4 * expansion.rest_error)
    assert expansion.trace == pytest.approx(float(hessian.trace()), abs=4 * expansion.rest_error)
    assert expansion.rest_error < 0.6
    d = 2 * pairs.eigenvectors[1]
    row = prediction.predict("one", "two", operator.space.take(model.parameters()) + d, operator.loss())
    assert row.displacement_outside == pytest.approx(2.0)
    assert row.bound == pytest.approx(0.5 * 5.0 * 4.0)  # what the pair left out does add, not 3 of the last one kept


def test_trace_is_unbiased_and_says_how_good_it_is() -> None:
    model, data, hessian = quadratic([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    operator = HessianOperator(model, squares, data)
    nothing = operator.space.zeros(0)
    estimate, error = trace_outside(operator, nothing, torch.tensor([], dtype=torch.long), 500)
    assert estimate == pytest.approx(float(hessian.trace()), abs=4 * error)
    assert error < 0.5
    several = [trace_outside(operator, nothing, torch.tensor([], dtype=torch.long), 20, seed) for seed in range(40)]
    spread = torch.tensor([value for value, _ in several]).std()
    assert float(spread) == pytest.approx(sum(error for _, error in several) / len(several), rel=0.4)
    assert trace_outside(operator, nothing, torch.tensor([], dtype=torch.long), 1)[1] is None


def test_stopping_and_going_on_changes_nothing() -> None:
    model, data = mlp(), batches("mlp", (5, 2))
    operator = HessianOperator(model, loss_fn, data)
    prediction = finished(model, operator, 4)
    theta = operator.space.take(moved(model, 2).parameters())
    prediction.measure("two", theta, lambda _: 1.5)
    state = json.loads(json.dumps(prediction.state()))
    vectors = {name: rows.clone() for name, rows in prediction.vectors.items()}
    again = ForgettingPrediction(operator.space, prediction.bases, vectors=vectors)
    again.load_state(state)
    assert again.report() == prediction.report()
    assert again.predict("one", "three", theta, 2.0) == prediction.predict("one", "three", theta, 2.0)
    again.measure("two", theta, lambda _: 1.5)  # measured a second time, it is not there twice
    assert again.rows == prediction.rows


def test_shares_are_the_weighted_squared_mass_of_each_parameter() -> None:
    model = mlp()
    space = HessianOperator(model, loss_fn, batches("mlp", (5,))).space
    basis = torch.linalg.qr(torch.randn(space.size, 3, dtype=torch.float64))[0].T.contiguous()
    shares = parameter_shares(basis, torch.tensor([3.0, 1.0, -7.0]), space)
    mass = (3 * basis[0] ** 2 + basis[1] ** 2) / 4
    assert shares == pytest.approx([float(part.sum()) for part in mass.split(space.layout.numels)])
    assert sum(shares) == pytest.approx(1.0)
    assert parameter_shares(basis, torch.zeros(3), space) == [0.0] * len(space.names)
