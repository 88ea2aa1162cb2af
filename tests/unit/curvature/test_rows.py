"""Eigenpairs from gradients of single samples against dense Gauss-Newton matrices, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.curvature.operators import GGNOperator
from nostalgia.curvature.rows import GradientRows, captured_energy, eigenpairs_of_rows
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.vector_space import VectorSpace
from tests.unit.curvature.networks import CLASSES, NETWORKS, batches, forward_fn, mlp

TOLERANCE = 1e-10


def dense(model: nn.Module, data: list[Any], parameters: Any = None, **options: Any) -> Tensor:
    """The Gauss-Newton matrix (P, P)."""
    operator = GGNOperator(model, forward_fn, data, parameters, **options)
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.size, dtype=torch.float64)])


def in_scope(kind: str, model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name or "lora" not in kind}


def assert_eigenpairs_of(matrix: Tensor, pairs: Any) -> None:
    k = len(pairs.eigenvalues)
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    scale = float(expected[0])
    torch.testing.assert_close(pairs.eigenvalues, expected, atol=TOLERANCE * scale, rtol=TOLERANCE)
    q = pairs.eigenvectors
    torch.testing.assert_close(q @ q.T, torch.eye(k, dtype=torch.float64), atol=TOLERANCE, rtol=0)
    defect = q @ matrix - pairs.eigenvalues[:, None] * q
    assert float(defect.norm(dim=1).max()) <= TOLERANCE * scale


@pytest.mark.parametrize("kind", ["mlp", "resnet", "vit_lora"])
def test_with_all_outputs_they_are_the_dense_matrix_s(kind: str) -> None:
    model = NETWORKS[kind]()
    data, scope = batches(kind, (4, 3)), in_scope(kind, model)
    pairs = eigenpairs_of_rows(GradientRows(model, forward_fn, data, scope, draws=CLASSES), 5)
    matrix = dense(model, data, scope)
    assert_eigenpairs_of(matrix, pairs)
    assert pairs.trace == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert bool(pairs.converged.all())
    assert float(pairs.residuals.max()) == 0.0


def test_squared_error_and_samples_left_out() -> None:
    model, (data,) = mlp(), batches("mlp", (6,))
    inputs, labels = data
    labels = labels.clone()
    labels[2] = -100
    pairs = eigenpairs_of_rows(GradientRows(model, forward_fn, [(inputs, labels)], draws=CLASSES), 4)
    assert_eigenpairs_of(dense(model, [(inputs, labels)]), pairs)
    squared = [(inputs, torch.nn.functional.one_hot(data[1], CLASSES).double())]
    pairs = eigenpairs_of_rows(GradientRows(model, forward_fn, squared, draws=CLASSES, loss="mse"), 4)
    assert_eigenpairs_of(dense(model, squared, loss="mse"), pairs)


class Twice(nn.Module):
    """One weight used twice, and one used past its module's forward: no layer's formula holds for them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.past, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(torch.tanh(nn.functional.linear(x, self.past.weight, self.past.bias)))


def test_weights_used_twice_or_past_their_module_are_right_too() -> None:
    model = Twice().double()
    data = batches("mlp", (5,))
    pairs = eigenpairs_of_rows(GradientRows(model, forward_fn, data, draws=CLASSES), 5)
    assert_eigenpairs_of(dense(model, data), pairs)


def test_random_rows_are_unbiased() -> None:
    """The mean of X^T X over seeds approaches G as one over the root of their number."""
    model, data = mlp(), batches("mlp", (4, 3))
    matrix = dense(model, data)
    total, seeds = torch.zeros_like(matrix), 400
    for seed in range(seeds):
        rows = GradientRows(model, forward_fn, data, draws=1, seed=seed)
        for block in rows:
            total += block.T @ block / 7
    assert rows.num_samples == 7
    assert float((total / seeds - matrix).norm() / matrix.norm()) <= 0.1


def test_pieces_do_not_matter() -> None:
    model, data = mlp(), batches("mlp", (4, 3))
    one = eigenpairs_of_rows(GradientRows(model, forward_fn, data, draws=2, seed=3), 4)
    other = eigenpairs_of_rows(GradientRows(model, forward_fn, data, draws=2, seed=3, piece_bytes=1), 4)
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues, atol=1e-12, rtol=1e-10)


def test_a_block_is_used_outside_the_network_s_precision() -> None:
    rows = GradientRows(mlp().float(), forward_fn, batches("mlp", (4,)), draws=1, precision="bf16")
    for block in rows:
        assert not torch.is_autocast_enabled("cpu")
        assert block.dtype == torch.float32


def test_streamed_rows_stay_within_their_bound() -> None:
    model, data = mlp(), batches("mlp", (40, 40))
    matrix = dense(model, data)
    rows = GradientRows(model, forward_fn, data, draws=CLASSES, piece_bytes=1)
    pairs = eigenpairs_of_rows(rows, 2, budget_bytes=1)
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:2]
    bound = float(pairs.residuals[0])
    assert bound > 0
    assert pairs.trace == pytest.approx(float(matrix.trace()), rel=1e-10)  # what is cut away counts
    assert bool((pairs.eigenvalues <= exact + 1e-12).all() and (exact <= pairs.eigenvalues + bound + 1e-12).all())
    q = pairs.eigenvectors
    assert float((q @ matrix - pairs.eigenvalues[:, None] * q).norm(dim=1).max()) <= bound + 1e-12


def test_captured_energy_is_the_share_of_the_trace() -> None:
    model, data, held_out = mlp(), batches("mlp", (4, 3)), batches("mlp", (5,))
    pairs = eigenpairs_of_rows(GradientRows(model, forward_fn, data, draws=CLASSES), 3)
    matrix, q = dense(model, held_out), pairs.eigenvectors
    energy = captured_energy(GradientRows(model, forward_fn, held_out, draws=CLASSES), q)
    assert energy == pytest.approx(float((q @ matrix @ q.T).trace() / matrix.trace()), rel=1e-10)


def test_fewer_rows_than_pairs_give_fewer_pairs() -> None:
    pairs = eigenpairs_of_rows(GradientRows(mlp(), forward_fn, batches("mlp", (2,)), draws=1), 8)
    assert len(pairs.eigenvalues) == 2


def test_refusals() -> None:
    model, data = mlp(), batches("mlp", (4,))
    with pytest.raises(UsageError, match="draws=0"):
        GradientRows(model, forward_fn, data, draws=0)
    with pytest.raises(UsageError, match="no samples"):
        GradientRows(model, forward_fn, [])
    with pytest.raises(UsageError, match="top_k=0"):
        eigenpairs_of_rows(GradientRows(model, forward_fn, data), 0)
    with pytest.raises(UsageError, match=r"needs \(samples, classes\)"):
        eigenpairs_of_rows(GradientRows(model, lambda m, b: (m(b[0])[:, None], b[1]), data), 1)
    with torch.no_grad():
        model.get_parameter("3.weight").fill_(float("nan"))
    with pytest.raises(RunFailedError, match="not finite"):
        eigenpairs_of_rows(GradientRows(model, forward_fn, data), 1)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, True),  # 512 samples, two rows each, of 1 million float32 numbers: 4.1 of 4.3 GB
        ({"num_samples": 2048}, False),
        ({"num_samples": 2048, "rows_budget_bytes": 2**34}, True),
        ({"kind": "hessian"}, False),
        ({"solver": "lanczos"}, False),
        ({"solver": "rows", "num_samples": 2048}, True),  # as asked for: cut to the top where they do not fit
    ],
)
def test_rows_are_taken_where_all_of_them_fit(given: dict[str, Any], rows: bool) -> None:
    space = VectorSpace.of({"w": torch.empty(1_000_000, device="meta")}, dtype=torch.float32, device="cpu")
    assert CurvatureOptions(**given).takes_rows(space) is rows
