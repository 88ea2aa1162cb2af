"""Subspaces against dense decompositions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nostalgia.linalg.subspace import merge_average, merge_union, orthonormalise, polish_, principal_angles
from nostalgia.linalg.vector_space import VectorSpace
from tests.unit.linalg.operators import shapes_of

SIZE = 60
DTYPES = [torch.float32, torch.float64]


def make_space(dtype=torch.float64, size=SIZE):
    return VectorSpace.of(shapes_of(size), dtype=dtype)


def random_basis(rows, space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(space.size, rows, generator=generator, dtype=torch.float64))
    return q.T.contiguous().to(space.dtype)


def projector_of(rows):
    q, _ = torch.linalg.qr(rows.double().T)
    return q @ q.T


def assert_orthonormal(basis):
    eye = torch.eye(len(basis), dtype=torch.float64)
    atol = 20 * torch.finfo(basis.dtype).eps
    torch.testing.assert_close(basis.double() @ basis.double().T, eye, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orthonormalise_spans_what_it_keeps(dtype):
    space = make_space(dtype)
    x = torch.stack([space.randn(i) * 10.0 ** (3 * (i - 3)) for i in range(6)])  # lengths over 15 decades
    basis, kept = orthonormalise(x, space)
    assert kept.tolist() == [True] * 6
    assert basis.dtype == dtype
    assert_orthonormal(basis)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(projector_of(basis), projector_of(unit), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orthonormalise_drops_what_adds_nothing(dtype):
    """The threshold is on the part outside the span of the earlier rows, relative to the row's length."""
    space = make_space(dtype)
    e = random_basis(4, space)
    inside = (e[0] + e[1]) / math.sqrt(2)
    rows = torch.stack([e[0], e[1], 5 * (inside + 0.9e-3 * e[2]), inside + 1.1e-3 * e[2], 0 * e[0], e[1], e[3]])
    basis, kept = orthonormalise(rows, space)
    assert kept.tolist() == [True, True, False, True, False, False, True]
    assert_orthonormal(basis)
    angles = principal_angles(basis, e, space)
    assert float(angles.max()) < 1e-3  # the direction kept at 1.1e-3 carries the rounding of its row


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_dependent_rows_come_out_orthonormal(dtype):
    """Each row 1e-2 off the sum of the earlier ones."""
    space = make_space(dtype)
    e = random_basis(20, space)
    rows = [e[0]]
    for i in range(1, 20):
        inside = torch.stack(rows).sum(0)
        rows.append(inside / inside.norm() + 1e-2 * e[i])
    basis, kept = orthonormalise(torch.stack(rows), space)
    assert kept.all()
    assert_orthonormal(basis)
    merged = merge_union([(torch.stack(rows), torch.ones(20))], 30, space)
    assert len(merged.basis) == 20
    assert_orthonormal(merged.basis)


def test_orthonormalise_nothing():
    space = make_space()
    basis, kept = orthonormalise(space.zeros(0), space)
    assert basis.shape == (0, SIZE)
    assert kept.shape == (0,)


def test_polish_is_in_place_and_stays_near():
    space = make_space(torch.float32)
    basis = random_basis(5, space)
    rough = basis + 1e-3 * torch.randn_like(basis)
    polished = polish_(rough.clone(), space)
    assert_orthonormal(polished)
    assert float((polished - rough).abs().max()) < 1e-2
    again = polished.clone()
    assert torch.equal(polish_(polished, space), again)


def dense_sum(pairs):
    return sum((q.double().T * values) @ q.double() for q, values in pairs)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_union_against_eigh(dtype, tol):
    space = make_space(dtype)
    pairs = [(random_basis(4, space, seed), torch.linspace(5, 1, 4).double() * (seed + 1)) for seed in range(3)]
    merged = merge_union(pairs, 100, space)
    values, vectors = torch.linalg.eigh(dense_sum(pairs))
    torch.testing.assert_close(merged.eigenvalues, values.flip(0)[:12], rtol=tol, atol=tol)
    assert len(merged.dropped_eigenvalues) == 0
    assert_orthonormal(merged.basis)
    overlaps = (merged.basis.double() @ vectors.flip(1)[:, :12]).abs()
    torch.testing.assert_close(overlaps, torch.eye(12, dtype=torch.float64), atol=30 * tol, rtol=0)


def test_union_drops_the_least_eigenvalues_first():
    space = make_space()
    pairs = [(random_basis(4, space, seed), torch.tensor([8.0, 4.0, 2.0, 1.0])) for seed in range(2)]
    whole, cut = merge_union(pairs, 8, space), merge_union(pairs, 5, space)
    torch.testing.assert_close(cut.eigenvalues, whole.eigenvalues[:5])
    torch.testing.assert_close(cut.dropped_eigenvalues, whole.eigenvalues[5:])
    torch.testing.assert_close(projector_of(cut.basis), projector_of(whole.basis[:5]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_union_keeps_a_fitted_task_beside_one_that_curves_a_million_times_more(dtype, order):
    space = make_space(dtype)
    fitted, sharp = random_basis(4, space, 0), random_basis(4, space, 1)
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    pairs = [(fitted, 1e-4 * values), (sharp, 1e3 * values)]
    merged = merge_union([pairs[number] for number in order], 16, space)
    assert (len(merged.basis), len(merged.dropped_eigenvalues)) == (8, 0)
    outside = fitted.double() - fitted.double() @ merged.basis.double().T @ merged.basis.double()
    assert float(outside.norm(dim=1).max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_task_that_recurs_adds_weight_and_no_direction(dtype):
    space = make_space(dtype)
    q = random_basis(4, space)
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    noisy, _ = orthonormalise(q + 1e-5 * torch.stack([space.randn(i) for i in range(4)]), space)
    merged = merge_union([(q, values), (noisy, values)], 16, space)
    torch.testing.assert_close(merged.eigenvalues, 2 * values, rtol=1e-6, atol=0)
    assert float(principal_angles(merged.basis, q, space).max()) < 2e-4


def test_only_positive_eigenvalues_above_noise_count():
    space = make_space()
    q = random_basis(5, space)
    values = torch.tensor([2.0, 1.0, 1e-14, 0.0, -3.0], dtype=torch.float64)
    merged = merge_union([(q, values)], 16, space)
    torch.testing.assert_close(merged.eigenvalues, values[:2])
    assert len(merged.dropped_eigenvalues) == 0
    for nothing in ([(q[3:], values[3:])], [(space.zeros(0), values[:0])], []):
        empty = merge_union(nothing, 16, space)
        assert empty.basis.shape == (0, SIZE)
        assert empty.eigenvalues.shape == (0,)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_average_against_dense_svd(tasks):
    """The thin SVD of F of the design, taken densely: its left vectors and squared singular values."""
    space = make_space()
    old, new = random_basis(6, space, 1), random_basis(6, space, 2)
    old_values, values = torch.linspace(9, 2, 6).double(), torch.linspace(12, 1, 6).double()
    merged = merge_average(old, old_values, new, values, tasks, 6, space)
    share = (tasks - 1) / tasks
    columns = [(share * old_values).sqrt() * old.T, (values / tasks).sqrt() * new.T]
    left, singular, _ = torch.linalg.svd(torch.cat(columns, dim=1), full_matrices=False)
    torch.testing.assert_close(merged.eigenvalues, singular[:6] ** 2)
    torch.testing.assert_close(projector_of(merged.basis), left[:, :6] @ left[:, :6].T, atol=1e-10, rtol=0)
    assert len(merged.dropped_eigenvalues) == (6 if tasks > 1 else 0)
    assert_orthonormal(merged.basis)


def test_running_average_is_the_mean_where_the_rank_suffices():
    space = make_space()
    pairs = [(random_basis(3, space, s), torch.tensor([3.0, 2.0, 1.0]).double() + s) for s in range(4)]
    basis, values = space.zeros(0), torch.zeros(0).double()
    for i, pair in enumerate(pairs):
        merged = merge_average(basis, values, *pair, i + 1, 12, space)
        basis, values = merged.basis, merged.eigenvalues
    torch.testing.assert_close(dense_sum([(basis, values)]), dense_sum(pairs) / 4)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-4, 0.5, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
def test_principal_angles_at_both_ends(angle):
    space = make_space()
    e = random_basis(6, space)
    second = torch.stack([math.cos(angle) * e[0] + math.sin(angle) * e[1], e[3]])
    for first, other in (
        (torch.stack([e[0], e[3], e[4]]), second),
        (second, torch.stack([e[0], e[3], e[4]])),
    ):
        angles = principal_angles(first, other, space)
        torch.testing.assert_close(angles, torch.tensor([0.0, angle], dtype=torch.float64), atol=3e-15, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_principal_angles_against_svd(m, n, seed):
    space = make_space(size=12)
    first, second = random_basis(m, space, seed), random_basis(n, space, seed + 1)
    cosines = torch.linalg.svdvals(first @ second.T).clamp(max=1.0)
    torch.testing.assert_close(principal_angles(first, second, space).cos(), cosines, atol=1e-12, rtol=0)


def test_float32_angles_see_down_to_rounding():
    space = make_space(torch.float32)
    q = random_basis(4, space)
    assert float(principal_angles(q, q, space).max()) < 1e-6
