"""What the ranks do in the tests of the linear algebra: everything is compared with one process's answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hessian_eigenthings.algorithms.spectral_density import spectral_density
from hessian_eigenthings.algorithms.trace import trace
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nostalgia.errors import UsageError
from nostalgia.linalg.backend import SpaceBackend
from nostalgia.linalg.lanczos import lanczos
from nostalgia.linalg.subspace import merge_average, merge_union, orthonormalise, principal_angles
from nostalgia.linalg.vector_space import Traffic, VectorSpace
from tests.unit.linalg.operators import DenseOperator, shapes_of, spectrum_matrix

SIZE = 60
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def whole_parameters() -> dict[str, Tensor]:
    return {name: torch.zeros_like(t, dtype=torch.float64) for name, t in shapes_of(SIZE).items()}


def sharded_parameters() -> dict[str, Tensor]:
    """FSDP2's shards on the CPU, of the same size: uneven ones, and empty ones from two ranks on."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(3, 1, bias=False), nn.BatchNorm1d(1), nn.Linear(3, 3)).double()
    module[3].bias = None
    module.extra = nn.Parameter(torch.randn(6, dtype=torch.float64))
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return dict(module.named_parameters())


def spaces() -> dict[str, tuple[VectorSpace, dict[str, Tensor]]]:
    whole, sharded = whole_parameters(), sharded_parameters()
    return {
        "sliced": (VectorSpace.of(whole, placement="sliced"), whole),
        "sharded": (VectorSpace.of(sharded), sharded),
    }


def issued(space: VectorSpace, call) -> tuple[Any, Traffic]:
    before = space.traffic.snapshot()
    return call(), space.traffic.since(before)


def full(space: VectorSpace, x: Tensor) -> Tensor:
    """The whole block in flat order, for comparison with one process."""
    return space.gather_flat(x if x.ndim == 2 else x[None])


def check_vector_space() -> list[int]:
    ranks = dist.get_world_size()
    several = int(ranks > 1)
    sizes = []
    for placement, (space, parameters) in spaces().items():
        alone = VectorSpace(space.names, space.shapes, "local", dtype=torch.float64)
        assert (space.placement, space.size, space.world_size) == (placement, SIZE, ranks)
        sizes.append(space.local_size)

        for seed in range(3):
            assert torch.equal(full(space, space.randn(seed))[0], alone.randn(seed))
            assert torch.equal(full(space, space.rademacher(seed))[0], alone.rademacher(seed))
        x, y = (torch.stack([space.randn(10 * j + i) for i in range(4)]) for j in (0, 1))
        wx, wy = (torch.stack([alone.randn(10 * j + i) for i in range(4)]) for j in (0, 1))

        for exact in (False, True):
            gram, traffic = issued(space, lambda: space.gram(x, y, exact=exact))  # noqa: B023
            torch.testing.assert_close(gram, wx @ wy.T, **FLOAT64)
            assert traffic == Traffic(0, several, several * 16 * 8)
        torch.testing.assert_close(space.norm(x[0]), wx[0].norm(), **FLOAT64)
        torch.testing.assert_close(space.dot(x[0], y[0]), wx[0] @ wy[0], **FLOAT64)

        gathered, traffic = issued(space, lambda: space.gather(x[0]))  # noqa: B023
        padded = space.layout.padded * ranks * 8
        assert traffic == Traffic(several, 0, several * padded)
        for part, expected, parameter in zip(gathered, alone.gather(wx[0]), parameters.values(), strict=True):
            assert part.shape == parameter.shape
            assert torch.equal(part, expected)

        partial = [(space.rank + 1) * part for part in gathered]
        summed, traffic = issued(space, lambda: space.scatter(partial))  # noqa: B023
        torch.testing.assert_close(summed, ranks * (ranks + 1) / 2 * x[0], **FLOAT64)
        assert traffic == Traffic(several, 0, several * padded)

        # Into the parameters and back: shards without communication, whole copies by one all-gather.
        _, traffic = issued(space, lambda: space.put(x[1], parameters.values()))  # noqa: B023
        assert traffic.large == (several if placement == "sliced" else 0)
        taken, traffic = issued(space, lambda: space.take(parameters.values()))  # noqa: B023
        assert torch.equal(taken, x[1])
        assert traffic == Traffic()
        for parameter, expected in zip(parameters.values(), alone.gather(wx[1]), strict=True):
            value = parameter.full_tensor() if placement == "sharded" else parameter
            assert torch.equal(value, expected)

        # Tensors that are whole on every rank, in any placement.
        copies = [torch.zeros(shape, dtype=torch.float64) for shape in space.shapes]
        space.put(x[2], copies)
        assert torch.equal(torch.cat([c.flatten() for c in copies]), wx[2])
        assert torch.equal(space.take(copies), x[2])
        assert torch.equal(full(space, x), wx)
        assert torch.equal(space.slice_flat(wx), x)

        everywhere = space.replicated()
        assert everywhere.local_size == SIZE
        torch.testing.assert_close(everywhere.gram(wx, wy), wx @ wy.T, **FLOAT64)
        assert everywhere.traffic == Traffic()
    for placement in ("sliced", "local"):
        shards = sharded_parameters()
        space = VectorSpace.of(shards, placement=placement)
        with pytest.raises(UsageError, match=f"is sharded over ranks but the vectors are {placement}"):
            space.take(shards.values())
    return sizes


def check_refused_shards() -> None:
    """Some parameters sharded and some not, and a two-dimensional mesh: one line each."""
    mixed = {**sharded_parameters(), "head.weight": torch.zeros(3)}
    with pytest.raises(UsageError, match=r"head\.weight is not sharded while others are"):
        VectorSpace.of(mixed)
    module = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    fully_shard(module, mesh=mesh)
    with pytest.raises(UsageError, match="weight is placed as"):
        VectorSpace.of(dict(module.named_parameters()))


def check_subspaces() -> list[list[float]]:
    results = []
    for space, _ in spaces().values():
        alone = VectorSpace(space.names, space.shapes, "local", dtype=torch.float64)
        blocks = []
        for task in range(3):
            basis, kept = orthonormalise(torch.stack([space.randn(10 * task + i) for i in range(5)]), space)
            expected, _ = orthonormalise(torch.stack([alone.randn(10 * task + i) for i in range(5)]), alone)
            torch.testing.assert_close(full(space, basis), expected, **FLOAT64)
            assert kept.tolist() == [True] * 5
            blocks.append((basis, expected, torch.linspace(5, 1, 5, dtype=torch.float64) + task))
        merged, traffic = issued(
            space,
            lambda: merge_union([(b, v) for b, _, v in blocks], 11, space),  # noqa: B023
        )
        assert traffic.large == 0
        assert traffic.small <= 2
        expected = merge_union([(e, v) for _, e, v in blocks], 11, alone)
        torch.testing.assert_close(merged.eigenvalues, expected.eigenvalues, **FLOAT64)
        torch.testing.assert_close(merged.dropped_eigenvalues, expected.dropped_eigenvalues, **FLOAT64)
        assert float(principal_angles(full(space, merged.basis), expected.basis, alone).max()) < 1e-9
        (old, whole_old, values), (new, whole_new, more) = blocks[:2]
        average = merge_average(old, values, new, more, 3, 5, space)
        expected_average = merge_average(whole_old, values, whole_new, more, 3, 5, alone)
        torch.testing.assert_close(average.eigenvalues, expected_average.eigenvalues, **FLOAT64)
        assert float(principal_angles(full(space, average.basis), expected_average.basis, alone).max()) < 1e-9
        angles = principal_angles(old, new, space)
        torch.testing.assert_close(angles, principal_angles(whole_old, whole_new, alone), rtol=1e-10, atol=1e-10)
        results.append(angles.tolist())
    return results


def spectra() -> dict[str, tuple[list[float], int]]:
    noise = (0.5 * (2 * torch.rand(SIZE - 8, generator=torch.Generator().manual_seed(0)) - 1)).tolist()
    return {
        "spiked": ([10.0, 8, 7, 6, 5, 4, 3, 2, *noise], 6),
        "copies": ([10.0, 10, 10, 7, 6, 5, 4, 3, *noise], 6),
        "low rank": ([3.0, 2, 1] + [0.0] * (SIZE - 3), 6),
        "identity": ([1.0] * SIZE, 6),
        "all": (torch.linspace(-1, 2, SIZE).tolist(), SIZE),
    }


def check_lanczos() -> dict[str, list[float]]:
    results = {}
    for placement, (space, _) in spaces().items():
        alone = VectorSpace(space.names, space.shapes, "local", dtype=torch.float64)
        for name, (eigenvalues, k) in spectra().items():
            matrix = spectrum_matrix(eigenvalues)
            operator, reference = DenseOperator(matrix, space), DenseOperator(matrix, alone)
            options = {"tol": 1e-10, "max_basis": 16 + k}
            before = space.traffic.snapshot()
            pairs, expected = lanczos(operator, k, **options), lanczos(reference, k, **options)
            traffic = space.traffic.since(before)
            torch.testing.assert_close(pairs.eigenvalues, expected.eigenvalues, rtol=1e-10, atol=1e-12)
            assert bool(pairs.converged.all())
            assert pairs.products == operator.calls
            vectors = full(space, pairs.eigenvectors)
            residuals = (vectors @ matrix - pairs.eigenvalues[:, None] * vectors).norm(dim=1)
            assert float(residuals.max()) < 1e-8
            torch.testing.assert_close(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), **FLOAT64)
            if name == "spiked":
                assert pairs.products == expected.products
                torch.testing.assert_close(vectors, expected.eigenvectors, rtol=0, atol=1e-8)
            if space.world_size > 1:
                # A product is a gather and a scatter. An iteration takes two small ones, three where a random
                # vector goes on; a few more are at the end.
                assert traffic.large == 2 * pairs.products
                assert traffic.small <= (2 if name == "spiked" else 3) * pairs.products + 6
                assert pairs.collectives == traffic.large + traffic.small
                assert pairs.bytes_moved == traffic.bytes > 2 * pairs.products * SIZE * 8
            results[f"{placement} {name}"] = pairs.eigenvalues.tolist()
    return results


def check_resume() -> None:
    """Each rank goes on from its part of the state, bit for bit."""
    space, _ = spaces()["sharded"]
    operator = DenseOperator(spectrum_matrix(spectra()["copies"][0]), space)
    states = []
    whole = lanczos(operator, 6, max_basis=14, callback=lambda p: states.append(p.state.clone()))
    for state in (states[len(states) // 3], states[-3]):
        rest = lanczos(operator, 6, max_basis=14, state=state)
        assert torch.equal(rest.eigenvectors, whole.eigenvectors)
        assert torch.equal(rest.eigenvalues, whole.eigenvalues)
        assert rest.products == whole.products


def check_memory() -> list[int]:
    """Bytes of vectors a solve holds on this rank, and of what it returns."""
    parameters = {"w": torch.zeros(1200)}
    space = VectorSpace.of(parameters, placement="sliced")
    operator = DenseOperator(torch.diag(torch.arange(1200.0)), space)
    held = []
    pairs = lanczos(operator, 8, max_products=60, callback=lambda p: held.append(p.state.basis))
    return [held[-1].untyped_storage().nbytes(), pairs.eigenvectors.untyped_storage().nbytes()]


def check_backend() -> dict[str, list[float]]:
    """hessian-eigenthings' routines: the numbers are those of one process, exactly the same on all ranks."""
    results = {}
    for placement, (space, _) in spaces().items():
        operator = DenseOperator(spectrum_matrix(torch.linspace(-1, 3, SIZE)), space)
        backend = SpaceBackend(space)
        samples = trace(operator, num_matvecs=10, method="hutchinson", seed=0, backend=backend).samples
        density = spectral_density(operator, num_runs=2, lanczos_steps=20, seed=0, backend=backend, num_grid_points=50)
        results[placement] = [
            *samples.tolist(),
            *density.density.tolist(),
            *density.raw_eigenvalues[0].tolist(),
        ]
    return results


def check_all() -> dict[str, Any]:
    check_refused_shards()
    check_resume()
    return {
        "sizes": check_vector_space(),
        "angles": check_subspaces(),
        "eigenvalues": check_lanczos(),
        "bytes": check_memory(),
        "backend": check_backend(),
    }
