"""The eigensolver against dense decompositions, on spectra that break careless ones."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.krylov import MAX_PARKED
from nostalgia.linalg.lanczos import _largest_weight, lanczos
from nostalgia.linalg.subspace import principal_angles
from nostalgia.linalg.vector_space import VectorSpace
from tests.unit.linalg.operators import DenseOperator, Diagonal, shapes_of, spectrum_matrix

DTYPES = [torch.float32, torch.float64]


def bulk(size: int, edge: float, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (edge * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)).tolist()


def make(eigenvalues, dtype=torch.float64, seed=0):
    matrix = spectrum_matrix(eigenvalues, seed)
    space = VectorSpace.of(shapes_of(len(matrix)), dtype=dtype)
    return matrix, DenseOperator(matrix, space)


def assert_right(pairs, matrix, tol, which="largest", slack=0.0):
    """Eigenvalues are the dense ones, vectors orthonormal, residuals honest, everything converged."""
    k, vectors = len(pairs.eigenvalues), pairs.eigenvectors.double()
    epsilon = torch.finfo(pairs.eigenvectors.dtype).eps
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    if which == "magnitude":
        exact = exact[exact.abs().argsort(descending=True, stable=True)]
    rounding = 20 * epsilon * float(exact.abs().max())
    torch.testing.assert_close(pairs.eigenvalues, exact[:k], rtol=tol, atol=rounding)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(vectors @ vectors.T, eye, atol=20 * epsilon, rtol=0)
    residuals = (vectors @ matrix - pairs.eigenvalues[:, None] * vectors).norm(dim=1)
    assert bool(pairs.converged.all())
    assert bool((residuals <= (tol * pairs.eigenvalues.abs()).clamp_min(rounding)).all())
    assert bool((residuals <= 1.1 * pairs.residuals + rounding + slack).all())


SPIKED = [10.0, 8, 7, 6, 5, 4, 3, 2, *bulk(192, 0.5)]
SPECTRA = {
    "spiked": (SPIKED, 8),
    "one": (SPIKED, 1),
    "five copies among eight": ([10.0] * 5 + [9, 8, 7, *bulk(192, 5.0)], 8),
    "all copies": ([10.0] * 8 + bulk(192, 5.0), 8),
    "copies at the end": ([10.0, 9, 8, 7, 6, 5, 5, 5, *bulk(192, 1.0)], 8),
    "copies beyond the end": ([10.0, 9, 8, 7, 6, 5, 4, 4, 4, 4, *bulk(192, 1.0)], 8),
    "cluster": ([10.0, 9.9999, 9.9998, 9.9997, 5, 4, 3, 2, *bulk(192, 0.5)], 8),
    "identity": ([1.0] * 50, 8),
    "zero": ([0.0] * 50, 8),
    "rank below k": ([5.0, 4, 3, 2, 1] + [0.0] * 95, 8),
    "rank below k, negative": ([5.0, 4, 3, -2, -10] + [0.0] * 95, 8),
    "all negative": ([-1.0 * i for i in range(1, 60)], 8),
    "tiny scale": ([1e-12 * x for x in SPIKED], 8),
    "large scale": ([1e12 * x for x in SPIKED], 8),
    "geometric": ([0.8**i for i in range(200)], 16),
    "all but one of P": (torch.linspace(-1, 3, 24).tolist(), 23),
    "all of P": (torch.linspace(-1, 3, 24).tolist(), 24),
    "P just above the basis": (torch.linspace(-1, 3, 34).tolist(), 8),
    "all of P, copies": ([2.0] * 10 + [-1.0] * 10 + [0.0] * 4, 24),
    "smallest space": ([3.0, 2, 1, 0, 0, 0, 0, 0], 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(name, dtype):
    eigenvalues, k = SPECTRA[name]
    matrix, operator = make(eigenvalues, dtype)
    pairs = lanczos(operator, k, tol=1e-3)
    assert_right(pairs, matrix, 1e-3)
    assert (pairs.eigenvalues.dtype, pairs.eigenvectors.dtype) == (torch.float64, dtype)
    assert pairs.products == operator.calls
    assert pairs.tol == 1e-3
    assert pairs.seconds > 0


@pytest.mark.parametrize("edge", [5.0, 8.0])
def test_more_copies_than_rows_can_be_parked(edge):
    matrix, operator = make([10.0] * 12 + bulk(292, edge, seed=2), torch.float32, seed=2)
    assert_right(lanczos(operator, 12, seed=2), matrix, 1e-3)


@pytest.mark.parametrize("name", ["spiked", "five copies among eight", "rank below k", "geometric"])
def test_to_the_last_digits_in_float64(name):
    eigenvalues, k = SPECTRA[name]
    matrix, operator = make(eigenvalues)
    pairs = lanczos(operator, k, tol=1e-9)
    assert_right(pairs, matrix, 1e-9)
    exact, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(pairs.eigenvalues, exact.flip(0)[:k], rtol=1e-12, atol=1e-13)
    angles = principal_angles(pairs.eigenvectors, vectors.T.flip(0)[:k].contiguous(), operator.space)
    assert name == "rank below k" or float(angles.max()) < 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["geometric", "all copies", "rank below k", "spread"])
def test_the_basis_stays_orthonormal(name, dtype):
    """At every product, over restarts and probes: no ghosts can arise."""
    eigenvalues, k = {**SPECTRA, "spread": ([1e5, 1e3, *bulk(198, 1.0)], 8)}[name]
    _, operator = make(eigenvalues, dtype)
    defects = []

    def measure(progress):
        state = progress.state
        rows = state.basis[: state.projected.shape[0] + state.active_coupling.shape[0]].double()
        defects.append(float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max()))
        parked = state.parked.double()
        if len(parked):
            defects.append(float((parked @ rows.T).abs().max()))
            defects.append(float((parked @ parked.T - state.parked_gram).abs().max()))

    lanczos(operator, k, tol=1e-5, max_basis=k + 6, max_products=200, callback=measure)
    assert max(defects) < 200 * torch.finfo(dtype).eps


def test_a_probe_ends_the_solve_and_a_longer_one_where_copies_were_found():
    for name, trailing in (("spiked", 4), ("five copies among eight", 16)):
        eigenvalues, k = SPECTRA[name]
        _, operator = make(eigenvalues)
        steps = []
        lanczos(operator, k, callback=steps.append)
        settled = [step.converged == k for step in steps]
        assert settled[-trailing - 1 :] == [True] * (trailing + 1), name
        assert len(steps) - settled.index(True) - 1 >= trailing


@pytest.mark.parametrize(("edge", "products"), [(0.3, 4), (1.5, 6), (2.9, 8)])
def test_a_probe_takes_as_many_products_as_telling_a_copy_takes(edge, products):
    """Sharp where the wanted eigenvalues stand out, the whole length where they hardly do; copies are found."""
    alone = [10.0, 9, 8, 7, 6, 5, 4, 3.2, 3]
    for copy in (None, 3.0, 10.0):
        found = 0
        for seed in range(4):
            values = torch.tensor(alone + [copy] * (copy is not None) + bulk(1990, edge)).double()
            operator = Diagonal(values)
            pairs = lanczos(operator, 9, seed=seed)
            found += bool(((pairs.eigenvalues - values.sort(descending=True).values[:9]).abs() < 1e-2).all())
            if copy is None:
                assert pairs.products - lanczos(operator, 9, seed=seed, probe=0).products <= products
        assert found >= 3


def test_what_a_starting_vector_can_hide_is_bounded():
    """The Christoffel function of exact arithmetic: at an eigenvalue, never below the vector's true weight on it."""
    values = torch.linspace(-1, 1, 30, dtype=torch.float64)
    start = torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start /= start.norm()
    rows, chain = [start], []
    for _ in range(8):
        product = values * rows[-1]
        diagonal = float(rows[-1] @ product)
        for _ in range(2):
            for row in rows:
                product = product - (row @ product) * row
        chain.append([diagonal, float(product.norm())])
        rows.append(product / product.norm())
    bounds = torch.tensor([_largest_weight(torch.tensor(chain), value) for value in values.tolist()])
    assert bool((bounds >= start.square() * (1 - 1e-9)).all())
    # It is the least |p(A) x|^2 with p(1) = 1, a least-squares problem.
    powers = torch.stack([values**i * start for i in range(9)], dim=1)
    difference = powers[:, 1:] - powers[:, :1]  # p = 1 + sum c_i (t^i - 1)
    least = start + difference @ torch.linalg.lstsq(difference, -start[:, None]).solution[:, 0]
    assert float(bounds[-1]) == pytest.approx(float(least @ least), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitude(dtype):
    matrix, operator = make([10.0, -9, 8, -7, 6, -5, *bulk(194, 0.5)], dtype)
    pairs = lanczos(operator, 6, which="magnitude")
    assert_right(pairs, matrix, 1e-3, which="magnitude")
    assert pairs.eigenvalues.sign().tolist() == [1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize(("max_basis", "allowed"), [(10, 60), (16, 40), (24, 32), (32, 30)])
def test_a_small_basis_costs_products_not_accuracy(max_basis, allowed):
    matrix, operator = make([0.8**i for i in range(200)], torch.float64)
    pairs = lanczos(operator, 8, tol=1e-6, max_basis=max_basis, probe=0)
    assert_right(pairs, matrix, 1e-6)
    assert pairs.products <= allowed


def test_no_more_products_than_arpack():
    """ARPACK by scipy, at the same tolerance, on a spectrum like a trained network's."""
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix, operator = make([*torch.logspace(2, 0, 40).tolist(), *bulk(360, 0.5)])
    dense, calls = matrix.numpy(), []

    def product(x):
        calls.append(1)
        return dense @ x

    linear = scipy_linalg.LinearOperator(dense.shape, matvec=product, dtype=dense.dtype)
    scipy_linalg.eigsh(linear, k=32, which="LA", tol=1e-3)
    pairs = lanczos(operator, 32, tol=1e-3)
    assert_right(pairs, matrix, 1e-3)
    assert pairs.products <= len(calls)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.0, 5.0]), min_size=8, max_size=40),
    k=st.integers(1, 8),
    seed=st.integers(0, 100),
    which=st.sampled_from(["largest", "magnitude"]),
)
def test_few_distinct_eigenvalues(values, k, seed, which):
    """Nothing but multiplicities: each Krylov space from one vector ends after a few products."""
    matrix, operator = make(values, seed=seed)
    pairs = lanczos(operator, k, seed=seed, which=which)
    if which == "magnitude":  # 1 and -1 tie: their order is free
        exact = torch.tensor(values, dtype=torch.float64).abs().sort(descending=True).values
        torch.testing.assert_close(pairs.eigenvalues.abs(), exact[:k], rtol=1e-6, atol=1e-9)
    else:
        # Breakdown after breakdown: estimates fall up to 2e-10 short of the true residuals (seen over 1,500 such
        # spectra, all eigenvalues right), far below any tolerance but above rounding.
        assert_right(pairs, matrix, 1e-3, slack=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cap_ends_a_solve_without_false_claims(dtype):
    matrix, operator = make(torch.linspace(0, 1, 300).tolist(), dtype)
    for cap in range(20, 60, 4):  # restarts fall before, at and after the cap
        pairs = lanczos(operator, 8, tol=1e-4, max_products=cap)
        assert pairs.products == cap
        vectors = pairs.eigenvectors.double()
        true = (vectors @ matrix - pairs.eigenvalues[:, None] * vectors).norm(dim=1)
        torch.testing.assert_close(pairs.residuals, true, rtol=1e-2, atol=1e-5)
        assert not bool(pairs.converged.all())
        assert bool((true[pairs.converged] <= 1.1e-4 * pairs.eigenvalues[pairs.converged].abs()).all())


def make_noisy(relative):
    """An operator whose every product is off by ``relative`` of its length, at random."""
    matrix, operator = make(SPIKED)
    exact = operator.matvec

    def matvec(v):
        w, generator = exact(v), torch.Generator().manual_seed(operator.calls)
        noise = torch.randn(len(w), generator=generator, dtype=w.dtype)
        return w + relative * noise * float(w.norm() / noise.norm())

    operator.matvec = matvec
    return matrix, operator


def test_noise_is_not_convergence():
    """Products with errors of 1e-2 relative cannot give residuals of 1e-4: said so, and soon."""
    _, operator = make_noisy(1e-2)
    pairs = lanczos(operator, 8, tol=1e-4, max_products=500)
    assert not bool(pairs.converged.any())
    assert pairs.products < 100
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor(SPIKED[:8]).double(), rtol=0.1, atol=0.1)
    loose = lanczos(operator, 4, tol=0.3)
    assert bool(loose.converged.all())


def test_how_much_of_the_noise_a_residual_tells():
    """Without restarts forgetting what they cut off, a part of it; true residuals, all of it."""
    matrix, operator = make_noisy(1e-4)
    for true_residuals, least in ((False, 0.15), (True, 0.7)):
        pairs = lanczos(operator, 8, tol=1e-9, max_basis=10, probe=0, true_residuals=true_residuals)
        vectors = pairs.eigenvectors
        exact = (vectors @ matrix - pairs.eigenvalues[:, None] * vectors).norm(dim=1)
        assert bool((pairs.residuals > least * exact).all())
        assert bool((pairs.residuals < 2 * exact).all())


def test_float32_rounding_is_not_convergence():
    """An eigenvalue 1e6 below the largest is converged to the documented floor, not to tol of itself."""
    matrix, operator = make([1e6, 1.0, 0.5, *bulk(97, 0.1)], torch.float32)
    pairs = lanczos(operator, 2, tol=1e-3, max_products=120)
    vectors = pairs.eigenvectors.double()
    true = (vectors @ matrix - pairs.eigenvalues[:, None] * vectors).norm(dim=1)
    assert bool(pairs.converged[0])
    assert float(true[1]) <= 10 * torch.finfo(torch.float32).eps * 1e6 or not bool(pairs.converged[1])


def test_true_residuals_cost_k_products():
    matrix, operator = make(SPIKED)
    estimated, true = lanczos(operator, 4), lanczos(operator, 4, true_residuals=True)
    assert true.products == estimated.products + 4
    vectors = true.eigenvectors
    exact = (vectors @ matrix - true.eigenvalues[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(true.residuals, exact, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(estimated.residuals, exact, rtol=1e-3, atol=1e-9)


def test_a_seed_fixes_the_result_and_its_signs():
    _, operator = make(SPIKED)
    a, b, c = (lanczos(operator, 4, seed=seed, tol=1e-10) for seed in (3, 3, 4))
    assert torch.equal(a.eigenvectors, b.eigenvectors)
    assert float((a.eigenvectors.abs() - c.eigenvectors.abs()).abs().max()) < 1e-8
    projections = a.eigenvectors @ operator.space.randn(3)
    assert bool((projections > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["five copies among eight", "geometric", "rank below k"])
def test_resuming_is_not_having_stopped(name, dtype):
    """From every product of a solve with restarts and probes, bit for bit."""
    eigenvalues, k = SPECTRA[name]
    _, operator = make(eigenvalues, dtype)
    states, steps = [], []

    def keep(progress):
        states.append(progress.state.clone())
        steps.append(progress)

    whole = lanczos(operator, k, max_basis=k + 8, callback=keep)
    assert [p.products for p in steps] == list(range(1, whole.products + 1))
    assert (steps[-1].converged, steps[-1].wanted) == (k, k)
    for state in states[:: max(1, len(states) // 12)]:
        rest = lanczos(operator, k, max_basis=k + 8, state=state)
        assert rest.products == whole.products
        assert torch.equal(rest.eigenvalues, whole.eigenvalues)
        assert torch.equal(rest.eigenvectors, whole.eigenvectors)
        assert torch.equal(rest.residuals, whole.residuals)


def test_a_resumed_solve_reports_the_cost_of_all_its_parts():
    class Slow(DenseOperator):
        def matvec(self, v):
            time.sleep(2e-3)
            self.space.traffic.large += 1
            self.space.traffic.bytes += 8
            return super().matvec(v)

    matrix = make(SPIKED)[0]
    operator = Slow(matrix, VectorSpace.of(shapes_of(len(matrix)), dtype=torch.float64))
    states = []
    whole = lanczos(operator, 4, callback=lambda p: states.append(p.state.clone()))
    rest = lanczos(operator, 4, state=states[len(states) // 2])
    assert (rest.products, rest.collectives, rest.bytes_moved) == (
        whole.products,
        whole.collectives,
        whole.bytes_moved,
    )
    assert rest.collectives >= rest.products
    assert rest.seconds > 2e-3 * rest.products


def test_vectors_held_are_bounded():
    """Two blocks of vectors make up the state: their rows are bounded, and released with the solve."""
    _, operator = make(SPECTRA["all copies"][0])
    seen = []
    pairs = lanczos(
        operator, 8, max_basis=20, callback=lambda p: seen.append((len(p.state.basis), len(p.state.parked)))
    )
    assert {rows for rows, _ in seen} == {20 + 2}
    assert 0 < max(parked for _, parked in seen) <= MAX_PARKED
    assert pairs.eigenvectors.untyped_storage().nbytes() == 8 * operator.size * 8
    states = []
    lanczos(operator, 8, callback=lambda p: states.append(weakref.ref(p.state.basis)))
    assert states[0]() is None


def test_a_product_that_is_not_finite_is_named():
    _, operator = make(SPIKED)
    exact = operator.matvec
    operator.matvec = lambda v: exact(v) * (float("nan") if operator.calls == 5 else 1.0)
    with pytest.raises(RunFailedError, match="product 5 of the eigensolve is not finite"):
        lanczos(operator, 8)
    operator.matvec = lambda v: torch.full_like(v, float("inf"))
    with pytest.raises(RunFailedError, match="product 1 of"):
        lanczos(operator, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "top_k=0: allowed is 1 to 200"),
        ({"k": 201}, "top_k=201: allowed is 1 to 200"),
        ({"k": 8, "which": "smallest"}, "which='smallest': allowed are largest, magnitude"),
        ({"k": 8, "tol": 0.0}, "tol=0.0"),
        ({"k": 8, "tol": float("nan")}, "tol=nan"),
        ({"k": 8, "max_basis": 9}, "max_basis=9 is too small for top_k=8: allowed is 10 or more"),
        ({"k": 8, "max_products": 7}, "max_products=7 is too small for top_k=8"),
    ],
)
def test_refusals(arguments, message):
    _, operator = make(SPIKED)
    with pytest.raises(UsageError, match=message) as error:
        lanczos(operator, **arguments)
    assert "\n" not in str(error.value)
    assert operator.calls == 0


def test_a_state_of_other_vectors_is_refused():
    _, operator = make(SPIKED)
    states = []
    lanczos(operator, 2, callback=lambda p: states.append(p.state.clone()))
    _, other = make(SPIKED[:50])
    with pytest.raises(UsageError, match="vectors of 200 numbers; this rank's have 50"):
        lanczos(other, 2, state=states[0])
