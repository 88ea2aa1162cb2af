"""Curvature products on every placement, against the dense matrices of one process, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nostalgia.curvature import GGNOperator, HessianOperator
from nostalgia.curvature.density import estimate_spectrum
from nostalgia.curvature.forgetting import ForgettingPrediction
from nostalgia.curvature.rows import GradientRows, captured_energy, eigenpairs_of_rows
from nostalgia.curvature.shares import parameter_shares
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.lanczos import lanczos
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.parallel.modules import bare_module, reshard
from tests.unit.curvature.networks import (
    NETWORKS,
    Batch,
    Oracle,
    assert_same,
    batches,
    fingerprint,
    forward_fn,
    loss_fn,
    mlp,
)
from tests.unit.linalg.operators import DenseOperator

SAMPLES = 11
SHARES = {1: [0, 11], 2: [0, 11, 11], 3: [0, 7, 7, 11]}  # unequal, and an empty rank
VARIABLES = {"mlp": "", "resnet": "", "vit_lora": "lora_"}


def check_all() -> dict[str, Any]:
    """Everything in one launch; returns relative errors by what was computed."""
    check_failures()
    check_sharded_gradients_leave_the_model_alone()
    check_bare_modules()
    return {
        "products": check_products(),
        "eigenpairs": check_eigenpairs(),
        "rows": check_rows(),
        "float32": check_float32_eigenvalues(),
        "spectrum": check_spectrum(),
        "forgetting": check_forgetting(),
    }


def share(kind: str, data: Batch) -> list[Batch]:
    """This rank's part, in batches of at most four."""
    low, high = SHARES[dist.get_world_size()][dist.get_rank() : dist.get_rank() + 2]
    inputs, labels = data
    return [(inputs[i : min(i + 4, high)], labels[i : min(i + 4, high)]) for i in range(low, high, 4)]


def wrapped(model: nn.Module, wrap: str, **options: Any) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(model)
    if wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in list(model.modules()):
            if type(module).__name__ in ("ViTLayer", "BasicBlock"):
                fully_shard(module, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model


def in_scope(kind: str, model: nn.Module) -> dict[str, nn.Parameter]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p for name, p in inner.named_parameters() if VARIABLES[kind] in name}


def check_products() -> dict[str, float]:
    """Every operator, method and wrapping: products equal the dense ones, with two large collectives each."""
    errors = {}
    for kind in VARIABLES:
        original = NETWORKS[kind]()
        (data,) = batches(kind, (SAMPLES,))
        oracle = Oracle(copy.deepcopy(original), list(in_scope(kind, original)), [data])
        matrices = {HessianOperator: oracle.hessian(), GGNOperator: oracle.gauss_newton()}
        for wrap in ("bare", "ddp", "fsdp2"):
            model = wrapped(copy.deepcopy(original).train(), wrap)
            for operator in operators(kind, model, share(kind, data)):
                before = fingerprint(model)
                error = compare(operator, matrices[type(operator)], oracle)
                assert_same(before, fingerprint(model))
                errors[f"{kind} {wrap} {type(operator).__name__} {operator.method}"] = error
    return errors


def check_rows() -> dict[str, list[float]]:
    """Eigenpairs from rows with all outputs: worst error of eigenvalues and residual; and the energy of random ones."""
    found = {}
    for kind in VARIABLES:
        original = NETWORKS[kind]()
        (data,) = batches(kind, (SAMPLES,))
        matrix = Oracle(copy.deepcopy(original), list(in_scope(kind, original)), [data]).gauss_newton()
        expected = torch.linalg.eigvalsh(matrix).flip(0)[:5]
        for wrap in ("bare", "ddp", "fsdp2"):
            model = wrapped(copy.deepcopy(original).train(), wrap)
            before, scope = fingerprint(model), in_scope(kind, model)
            pairs = eigenpairs_of_rows(GradientRows(model, forward_fn, share(kind, data), scope, draws=3), 5)
            q = pairs.space.gather_flat(pairs.eigenvectors)
            defect = float((q @ matrix - pairs.eigenvalues[:, None] * q).norm(dim=1).max() / expected[0])
            drawn = GradientRows(model, forward_fn, share(kind, data), scope, draws=2, seed=5)
            energy = captured_energy(drawn, pairs.eigenvectors)
            assert_same(before, fingerprint(model))
            found[f"{kind} {wrap}"] = [
                float((pairs.eigenvalues - expected).abs().max() / expected[0]),
                defect,
                energy,
            ]
    return found


def operators(kind: str, model: nn.Module, data: list[Batch]) -> Iterator[Any]:
    scope = in_scope(kind, model)
    # No finite differences of a kinked network: its third derivative is not there.
    for method in ("exact", "jvp", "finite_difference")[: 2 if kind == "resnet" else 3]:
        yield HessianOperator(model, loss_fn, data, scope, method=method)
    for method in ("exact", "jvp"):
        yield GGNOperator(model, forward_fn, data, scope, method=method)


def compare(operator: Any, matrix: Tensor, oracle: Oracle) -> float:
    """Relative error of two products, loss and gradient; counts collectives of the second product."""
    space = operator.space
    assert operator.num_samples == SAMPLES
    assert operator.loss() == pytest.approx(oracle.loss(), rel=1e-12)
    gradient = space.slice_flat(oracle.gradient()[None])[0]
    worst = float(space.norm(operator.gradient() - gradient) / space.norm(gradient))
    for seed in (3, 4):
        v = space.randn(seed)
        expected = space.slice_flat((matrix @ space.gather_flat(v[None])[0])[None])[0]
        before = space.traffic.snapshot()
        result = operator.matvec(v)
        moved = space.traffic.since(before)
        assert result.shape == (space.local_size,)
        worst = max(worst, float(space.norm(result - expected) / space.norm(expected)))
    if operator.method != "finite_difference":
        assert (moved.large, moved.small) == ((2, 0) if space.world_size > 1 else (0, 0))
    return worst


def check_eigenpairs() -> dict[str, list[float]]:
    """Top eigenvalues of the Hessian against the dense ones, and the worst true residual."""
    (data,) = batches("mlp", (SAMPLES,))
    oracle = Oracle(mlp(), [name for name, _ in mlp().named_parameters()], [data])
    expected = torch.linalg.eigvalsh(oracle.hessian()).flip(0)[:4]
    found = {}
    for wrap in ("ddp", "fsdp2"):
        operator = HessianOperator(wrapped(mlp(), wrap), loss_fn, share("mlp", data))
        pairs = lanczos(operator, 4, tol=1e-9, true_residuals=True)
        assert bool(pairs.converged.all())
        found[wrap] = [float((pairs.eigenvalues - expected).abs().max()), float(pairs.residuals.max())]
    return found


def check_float32_eigenvalues() -> dict[str, float]:
    """Relative error in the largest of float32 eigenvalues at the parameters that the dense matrix is of."""
    (data,) = batches("mlp", (SAMPLES,))
    oracle = Oracle(mlp().float().double(), [name for name, _ in mlp().named_parameters()], [data])
    found = {}
    for kind, matrix in ((HessianOperator, oracle.hessian()), (GGNOperator, oracle.gauss_newton())):
        expected = torch.linalg.eigvalsh(matrix).flip(0)[:4]
        for wrap in ("bare", "ddp", "fsdp2"):
            function = loss_fn if kind is HessianOperator else forward_fn
            operator = kind(wrapped(mlp().float(), wrap), function, share("mlp", data))
            pairs = lanczos(operator, 4, tol=1e-4)
            assert bool(pairs.converged.all())
            found[f"{kind.__name__} {wrap}"] = float((pairs.eigenvalues - expected).abs().max() / expected[0])
    return found


def check_spectrum() -> dict[str, list[float]]:
    """Errors of trace and density against the same random vectors on the dense matrix; products and their noise."""
    (data,) = batches("mlp", (SAMPLES,))
    matrix = Oracle(mlp(), [name for name, _ in mlp().named_parameters()], [data]).hessian()
    found = {}
    for wrap in ("ddp", "fsdp2"):
        operator = HessianOperator(wrapped(mlp(), wrap), loss_fn, share("mlp", data))
        space = operator.space
        dense = DenseOperator(matrix, VectorSpace(space.names, space.shapes, "local", dtype=space.dtype))
        dense.products = 0  # counted by operators of batches only
        mine, expected = (estimate_spectrum(o, runs=2, steps=8, seed=3) for o in (operator, dense))
        found[wrap] = [
            abs(mine.trace - expected.trace),
            float((mine.density - expected.density).abs().max()),
            float((mine.grid - expected.grid).abs().max()),
            abs(mine.trace - float(matrix.trace())) / mine.trace_error,
            mine.products,
        ]
    return found


def check_forgetting() -> dict[str, dict[str, Any]]:
    """The terms of a prediction, and the shares of the parameters, on every placement: the same numbers."""
    (data,) = batches("mlp", (SAMPLES,))
    found = {}
    for wrap in ("ddp", "fsdp2"):
        operator = HessianOperator(wrapped(mlp(), wrap), loss_fn, share("mlp", data))
        space = operator.space
        pairs = lanczos(operator, 4, tol=1e-9)
        prediction = ForgettingPrediction(space, {"one": pairs.eigenvectors}, trace_samples=4)
        prediction.finish("one", operator, pairs)
        moved = space.take(p.detach() for p in operator.parameters.values()) + 0.1 * space.randn(7)
        (row,) = prediction.measure("two", moved, lambda _: 3.0)
        numbers = {name: value for name, value in vars(row).items() if isinstance(value, float)}
        expansion = prediction.expansions["one"]
        shares = parameter_shares(pairs.eigenvectors, pairs.eigenvalues, space)
        assert all(rows.shape == (2, space.local_size) for rows in prediction.vectors.values())
        found[wrap] = {**numbers, "rest": expansion.rest, "gradient": expansion.gradient_norm, "first": shares[0]}
    return found


class Interrupted(Exception):
    pass


class Fragile(nn.Module):
    """An MLP that can be made to fail in the middle of its forward, on all ranks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.inner[0](x)
        if self.fails:
            raise Interrupted
        return self.inner[3](self.inner[1](x))


def patch_as_accelerate_does(model: nn.Module) -> None:
    """Autocast around the forward, in the instance's dictionary."""
    model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(model._original_forward)


def check_sharded_gradients_leave_the_model_alone() -> None:
    """Finite differences by the sharded model: state to the bit, after success and after failure."""
    model = Fragile().float()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.inner[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    (data,) = batches("mlp", (SAMPLES,))
    mine = share("mlp", data)
    exact = HessianOperator(model, loss_fn, mine)
    v = exact.space.randn(0)
    expected = exact.matvec(v)
    patch_as_accelerate_does(model)
    train_step(model, data)  # gradients, and parameters that an optimizer would know
    operator = HessianOperator(model, loss_fn, mine, method="finite_difference")
    before, forward, outputs = fingerprint(model), model.forward, evaluate(model, data)
    result = operator.matvec(v)
    assert torch.equal(evaluate(model, data), outputs)
    # Were it under the patch's autocast, its error would be that of bfloat16.
    assert float(exact.space.norm(result - expected) / exact.space.norm(expected)) < 5e-3
    assert operator.estimated_error < 5e-3
    operator.gradient()
    operator.loss()
    assert_same(before, fingerprint(model))
    assert model.forward is forward
    for place in ("forward", "loss"):
        model.fails = place == "forward"
        broken = HessianOperator(model, interrupt if place == "loss" else loss_fn, mine, method="finite_difference")
        broken._totals = operator._measured()
        for product in (broken.gradient, lambda broken=broken: broken.matvec(v)):
            with pytest.raises(Interrupted):
                product()
            assert model.forward is forward
            fails, model.fails = model.fails, False
            assert torch.equal(evaluate(model, data), outputs)
            reshard(model)
            assert_same(before, fingerprint(model))
            model.fails = fails
    model.fails = False
    torch.testing.assert_close(operator.matvec(v), result, rtol=0, atol=0)
    train_step(model, data)  # the sharded model still trains
    assert_same(before["gradients"], [p.grad for p in model.parameters()])


def interrupt(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    loss_fn(model, batch)
    raise Interrupted


def evaluate(model: nn.Module, data: Batch) -> Tensor:
    """Outputs, by a forward that leaves the root's parameters whole and so could hide what its shards are."""
    calls = model.calls.clone()
    with torch.no_grad():
        outputs = model(data[0])
    model.calls.copy_(calls)
    return outputs


def train_step(model: nn.Module, data: Batch) -> None:
    model.zero_grad()
    loss_fn(model, data)[0].backward()


def check_bare_modules() -> None:
    """What comes out of the shards is the network that went in, on every rank."""
    original = NETWORKS["vit_lora"]()
    state = {name: t.clone() for name, t in original.state_dict().items()}
    bare = bare_module(wrapped(original, "fsdp2"))
    assert not any(isinstance(p, DTensor) for p in bare.parameters())
    assert_same(state, dict(bare.state_dict()))


def check_failures() -> None:
    """What is wrong on one rank is an error on all of them, and no rank waits for another."""
    rank = dist.get_rank()
    for wrap in ("ddp", "fsdp2"):
        model = wrapped(mlp(), wrap)
        for method in HessianOperator.METHODS:
            operator = HessianOperator(model, loss_fn, [], method=method)
            for product in (operator.loss, operator.gradient, lambda op=operator: op.matvec(op.space.zeros())):
                with pytest.raises(UsageError, match="empty on every rank"):
                    product()
        spoiled = HessianOperator(model, cusp if rank == 0 else loss_fn, batches("mlp", (3,)))
        if min(spoiled.space.layout.local_sizes) == 0:
            continue
        where = "first in 0.weight" if rank == 0 else "on another rank"
        with pytest.raises(RunFailedError, match=f"curvature product 1 is not finite .{where}"):
            spoiled.matvec(spoiled.space.randn(0))
    sharded = wrapped(mlp().requires_grad_(False), "fsdp2")
    with pytest.raises(UsageError, match=r"0.weight is in scope but does not require a gradient"):
        HessianOperator(sharded, loss_fn, [], sharded.parameters(), method="finite_difference")
    with pytest.raises(UsageError, match="sharded model's own precision"):
        HessianOperator(wrapped(mlp().float(), "fsdp2"), loss_fn, [], method="finite_difference", precision="float64")
    rounded = wrapped(mlp().float(), "fsdp2", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    operator = HessianOperator(rounded, loss_fn, batches("mlp", (3 + rank,)), method="finite_difference")
    with pytest.raises(RunFailedError, match=r"train.precision=32"):
        operator.matvec(operator.space.randn(0))


def cusp(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """A finite loss whose derivative is not."""
    return (model(batch[0]).sum() * 0).abs().sqrt(), len(batch[0])
