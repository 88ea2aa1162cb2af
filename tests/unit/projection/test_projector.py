"""Projection against dense formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.projection import count_reads
from nostalgia.errors import UsageError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection import CurvatureMemory, GradientProjector
from nostalgia.projection import rows as rows_module
from nostalgia.projection.metric import identity


def pairs(model: nn.Module, k: int, seed: int = 0, converged: bool = True) -> Eigenpairs:
    space = VectorSpace.of(dict(model.named_parameters()), placement="local")
    draws = torch.randn(space.size, k, generator=torch.Generator().manual_seed(seed), dtype=space.dtype)
    return Eigenpairs(
        eigenvalues=torch.arange(k, 0, -1, dtype=torch.float64),
        eigenvectors=torch.linalg.qr(draws)[0].T.contiguous(),
        residuals=torch.zeros(k, dtype=torch.float64),
        converged=torch.full((k,), converged),
        products=0,
        collectives=0,
        bytes_moved=0,
        seconds=0.0,
        tol=1e-3,
        space=space,
    )


def setup(dtype: torch.dtype = torch.float64, basis_dtype: torch.dtype | None = None, k: int = 5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    memory = CurvatureMemory(k, dtype=basis_dtype)
    memory.update(pairs(model, k))
    return model, memory, GradientProjector(memory, dict(model.named_parameters()))


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(torch.randn(8, 6, generator=generator, dtype=dtype)).square().sum().backward()


def test_gradient_projection_is_the_dense_one() -> None:
    model, memory, projector = setup()
    backward(model, 1)
    before = flat(p.grad for p in model.parameters())
    fraction = projector.project_gradients()
    q = memory.basis
    expected = before - q.T @ (q @ before)
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), expected, rtol=1e-12, atol=1e-12)
    assert float(fraction) == pytest.approx(float((q @ before).square().sum() / before.square().sum()), rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(64, 1 << 14), (2, 16), (5, 7)])
def test_constrained_step_is_the_dense_formula_in_adams_metric(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and in blocks of ``rows`` and ``columns`` of Q with incomplete last ones."""
    monkeypatch.setitem(rows_module.ROWS, "cpu", rows)
    monkeypatch.setitem(rows_module.CHUNK, "cpu", columns)
    model, memory, projector = setup()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    twin = torch.nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    twin.load_state_dict(model.state_dict())
    backward(model, 2)
    backward(twin, 2)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.05)
    start = flat(model.parameters())
    plain.step()
    d0 = flat(twin.parameters()) - start
    v_hat = flat(plain.state[p]["exp_avg_sq"] for p in twin.parameters()) / (1 - 0.999)
    metric = v_hat.sqrt() + 1e-8
    metric = metric.clamp_min(0.1 * metric.square().mean().sqrt())
    q = memory.basis
    system = q @ torch.diag(1 / metric) @ q.T
    expected = d0 - (1 / metric) * (q.T @ torch.linalg.solve(system, q @ d0))
    projector.constrain_step(optimizer)
    torch.testing.assert_close(flat(model.parameters()) - start, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", ["constrain_step", "displace_step"])
@pytest.mark.parametrize("optimizer_kind", ["adamw", "sgd"])
@pytest.mark.parametrize("basis_dtype", [None, torch.bfloat16])
def test_leak_stays_at_rounding(kind: str, optimizer_kind: str, basis_dtype: torch.dtype | None) -> None:
    model, _, projector = setup(torch.float32, basis_dtype)
    make = {"adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.05),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.05)}  # fmt: skip
    optimizer = make[optimizer_kind](model.parameters())
    for step in range(60):
        backward(model, step)
        projector.project_gradients()
        getattr(projector, kind)(optimizer)
    assert projector.leak() <= 1e-6


def test_metric_stands_still_between_looks() -> None:
    """Each step is the dense formula with the metric of the step that looked last: the first and the fourth of five."""
    model, memory, _ = setup()
    projector = GradientProjector(memory, dict(model.named_parameters()), metric_every=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    twin = torch.nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.05)
    q, metric = memory.basis, None
    for step in range(5):
        start = flat(twin.parameters())
        backward(model, step)
        backward(twin, step)
        plain.step()
        d0 = flat(twin.parameters()) - start
        if step % 3 == 0:
            v_hat = flat(plain.state[p]["exp_avg_sq"] for p in twin.parameters()) / (1 - 0.999 ** (step + 1))
            metric = v_hat.sqrt() + 1e-8
            metric = metric.clamp_min(0.1 * metric.square().mean().sqrt())
        d = d0 - (1 / metric) * (q.T @ torch.linalg.solve(q @ torch.diag(1 / metric) @ q.T, q @ d0))
        torch.nn.utils.vector_to_parameters(start + d, twin.parameters())
        projector.constrain_step(optimizer)
        torch.testing.assert_close(flat(model.parameters()), start + d, rtol=0, atol=1e-10)


def test_step_between_looks_reads_the_basis_twice() -> None:
    model, memory, projector = setup(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model, 0)
    projector.constrain_step(optimizer)
    backward(model, 1)
    assert count_reads(memory.basis, projector.project_gradients) == 2
    assert count_reads(memory.basis, lambda: projector.constrain_step(optimizer)) == 2


@pytest.mark.parametrize("cut", [1, 4])
def test_state_goes_on_to_the_bit(cut: int) -> None:
    """A projector that takes up the state in the middle steps as the one that it is from, metric and factor included."""
    model, memory, projector = setup(torch.float32)
    projector = GradientProjector(memory, dict(model.named_parameters()), metric_every=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(6):
        if step == cut:
            state = projector.state()
            projector = GradientProjector(memory, dict(model.named_parameters()), metric_every=3)
            twin, optimizer_twin = copy.deepcopy((model, optimizer))
            projector.load_state(state)
            other = GradientProjector(memory, dict(twin.named_parameters()), metric_every=3)
            other.load_state(state)
        backward(model, step)
        projector.constrain_step(optimizer)
    for step in range(cut, 6):
        backward(twin, step)
        other.constrain_step(optimizer_twin)
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    assert projector.leak() == other.leak()


def test_optimizer_of_unknown_metric_is_refused_before_the_step() -> None:
    model, _, projector = setup()
    backward(model, 0)
    start = flat(model.parameters())
    with pytest.raises(UsageError, match="Adagrad is not known; known are AdamW") as refusal:
        projector.constrain_step(torch.optim.Adagrad(model.parameters()))
    assert "\n" not in str(refusal.value)
    assert torch.equal(flat(model.parameters()), start)


def test_own_optimizer_declares_its_metric() -> None:
    class Own(torch.optim.Adagrad):
        diagonal_metric = staticmethod(identity)

    model, _, projector = setup()
    backward(model, 0)
    projector.constrain_step(Own(model.parameters()))
    assert projector.leak() < 1e-14


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adam])
def test_metric_of_other_optimizers(kind) -> None:
    """Each gives a step in the complement, and the correction lies in D^-1 times the span, D of the second moment."""
    model, memory, projector = setup()
    optimizer = kind(model.parameters(), lr=1e-2)
    twin, plain = copy.deepcopy((model, optimizer))
    for net in (model, twin):
        backward(net, 0)
    plain.step()
    projector.constrain_step(optimizer)
    assert projector.leak() < 1e-12
    key = "square_avg" if kind is torch.optim.RMSprop else "exp_avg_sq"
    unbiased = 1.0 if kind is torch.optim.RMSprop else 1 - 0.999
    metric = (flat(plain.state[p][key] for p in twin.parameters()) / unbiased).sqrt() + 1e-8
    metric = metric.clamp_min(0.1 * metric.square().mean().sqrt())
    correction = metric * (flat(twin.parameters()) - flat(model.parameters()))
    q = memory.basis
    torch.testing.assert_close(q.T @ (q @ correction), correction, rtol=0, atol=1e-12)


def test_gradient_projection_alone_leaks_with_adamw() -> None:
    model, _, projector = setup(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(10):
        backward(model, step)
        projector.project_gradients()
        optimizer.step()
    assert projector.leak() > 1e-3


def test_step_without_gradient_moves_nothing() -> None:
    model, _, projector = setup()
    start = flat(model.parameters())
    projector.constrain_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(flat(model.parameters()), start)


def test_empty_memory_projects_nothing() -> None:
    model = nn.Linear(3, 2)
    projector = GradientProjector(CurvatureMemory(2), dict(model.named_parameters()))
    assert projector.project_gradients() is None
    assert projector.leak() is None


def test_unconverged_and_negative_pairs_are_left_out() -> None:
    model = nn.Linear(3, 2).double()
    memory = CurvatureMemory(3)
    update = memory.update(pairs(model, 3, converged=False))
    assert (update.added, update.left_out, memory.columns) == (0, 3, 0)


def test_wrong_parameters_are_refused() -> None:
    _, memory, _ = setup()
    with pytest.raises(UsageError, match="same parameters"):
        GradientProjector(memory, dict(nn.Linear(3, 2).named_parameters()))


def test_union_keeps_the_rank_budget_and_says_what_went() -> None:
    model = nn.Linear(6, 5).double()
    memory = CurvatureMemory(4, k_max=6)
    memory.update(pairs(model, 4, seed=0))
    update = memory.update(pairs(model, 4, seed=1))
    assert (memory.columns, update.dropped) == (6, 2)
    gram = memory.basis @ memory.basis.T
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
