"""Products against dense matrices in float64, on the kinds of network the program is for."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from accelerate import Accelerator
from hessian_eigenthings.algorithms.trace import trace
from torch import nn

from nostalgia.config import parse
from nostalgia.curvature import GGNOperator, HessianOperator
from nostalgia.curvature.density import estimate_spectrum
from nostalgia.curvature.eigenspace import task_operator
from nostalgia.data.stream import Batch
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.experiment.method_choice import curvature_options
from nostalgia.linalg.backend import SpaceBackend
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models.objective import Objective
from nostalgia.models.task_model import TaskModel
from tests.unit.curvature.networks import (
    NETWORKS,
    Oracle,
    batches,
    forward_fn,
    loss_fn,
    mlp,
    relative,
    scope,
    vectors,
    vit,
)

TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request):
    """A network, its scope, its data and its dense matrices."""
    kind = request.param
    model, data = NETWORKS[kind](), batches(kind)
    parameters = scope(kind, model)
    return model, parameters, data, Oracle(copy.deepcopy(model), list(parameters), data)


@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_hessian_is_the_dense_one(case, method):
    model, parameters, data, oracle = case
    operator = HessianOperator(model, loss_fn, data, parameters, method=method)
    dense = oracle.hessian()
    for v in vectors(operator.size):
        assert relative(operator.matvec(v), dense @ v) < TOLERANCE
    assert operator.loss() == pytest.approx(oracle.loss(), rel=1e-12)
    assert relative(operator.gradient(), oracle.gradient()) < TOLERANCE
    assert operator.num_samples == 7


@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_gauss_newton_is_the_dense_one(case, method):
    model, parameters, data, oracle = case
    operator = GGNOperator(model, forward_fn, data, parameters, method=method)
    dense = oracle.gauss_newton()
    for v in vectors(operator.size):
        assert relative(operator.matvec(v), dense @ v) < TOLERANCE
    assert operator.loss() == pytest.approx(oracle.loss(), rel=1e-12)
    assert relative(operator.gradient(), oracle.gradient()) < TOLERANCE


def test_whole_matrix_column_by_column():
    model, data = mlp(), batches("mlp")
    operator = HessianOperator(model, loss_fn, data)
    oracle = Oracle(copy.deepcopy(model), operator.names, data)
    columns = torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)])
    torch.testing.assert_close(columns, oracle.hessian(), rtol=0, atol=1e-14)


def test_the_scope_alone_decides_what_is_a_variable():
    """Frozen weights may be variables and trainable ones constants; layer norm is among them."""
    model, data = vit(lora=True), batches("vit")
    parameters = {n: p for n, p in model.named_parameters() if "layers.0.layernorm" in n or "v_proj.base" in n}
    assert not any(p.requires_grad for p in parameters.values())
    oracle = Oracle(vit(lora=True), list(parameters), data)
    dense = oracle.hessian()
    for method in ("exact", "jvp"):
        operator = HessianOperator(model, loss_fn, data, parameters.values(), method=method)
        assert operator.names == tuple(parameters)
        for v in vectors(operator.size):
            assert relative(operator.matvec(v), dense @ v) < TOLERANCE


@pytest.mark.parametrize(("make", "function"), [(HessianOperator, loss_fn), (GGNOperator, forward_fn)])
def test_keeping_graphs_changes_nothing(make, function):
    data = batches("mlp", (4, 3, 1))
    operators = [make(mlp(), function, data, retain_graph=policy) for policy in (True, False, "auto")]
    for v in vectors(operators[0].size):
        products = [operator.matvec(v) for operator in operators]
        assert torch.equal(products[0], products[1])
        assert torch.equal(products[0], products[2])
    assert [operator.retained for operator in operators] == [3, 0, 3]


@pytest.mark.parametrize(("make", "function"), [(HessianOperator, loss_fn), (GGNOperator, forward_fn)])
def test_compiled_products_are_the_same(make, function):
    model, data = mlp(), batches("mlp")
    v = next(vectors(43))
    compiled = make(model, function, data, method="jvp", compile=True)
    compiled._compiler = {"backend": "aot_eager", "fullgraph": True}  # the same trace, without a C++ compiler
    expected = make(model, function, data).matvec(v)
    assert relative(compiled.matvec(v), expected) < TOLERANCE
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    compiled.refresh()
    assert relative(compiled.matvec(v), make(model, function, data).matvec(v)) < TOLERANCE


def test_an_empty_batch_and_the_order_do_not_matter():
    model, data = mlp(), batches("mlp", (4, 0, 3))
    v = next(vectors(43))
    expected = HessianOperator(model, loss_fn, [data[2], data[0]]).matvec(v)
    assert relative(HessianOperator(model, loss_fn, data).matvec(v), expected) < 1e-14


@pytest.mark.parametrize("method", ["exact", "jvp"])
@pytest.mark.parametrize(("make", "function"), [(HessianOperator, loss_fn), (GGNOperator, forward_fn)])
def test_parameters_the_loss_does_not_reach_have_zero_blocks(make, function, method):
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.used = mlp()

        def forward(self, x):
            return self.used(x)

    operator = make(Spare(), function, batches("mlp"), method=method, precision="float64")
    product = operator.matvec(next(vectors(operator.size)))
    assert not product[:6].any()
    assert product[6:].any()


@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_a_linear_loss_has_no_curvature(method):
    def total(model, batch):
        return model(batch[0]).sum(), len(batch[0])

    operator = HessianOperator(nn.Linear(4, 3).double(), total, batches("mlp"), method=method)
    assert not operator.matvec(next(vectors(operator.size))).any()


@pytest.mark.parametrize(("precision", "error"), [("float64", 0.0), ("tf32", 1e-4), ("bf16", 5e-2)])
def test_precisions(precision, error):
    """float32 parameters: float64 products are those of a float64 copy, bfloat16 ones are near."""
    model, data = vit().float(), batches("vit")
    exact = HessianOperator(copy.deepcopy(model).double(), loss_fn, data)
    operator = HessianOperator(model, loss_fn, data, precision=precision)
    assert operator.dtype == (torch.float64 if precision == "float64" else torch.float32)
    v = next(vectors(operator.size))
    assert relative(operator.matvec(v.to(operator.dtype)), exact.matvec(v)) <= error
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_vectors_are_float32_at_least():
    operator = HessianOperator(mlp().bfloat16(), loss_fn, batches("mlp"))
    assert operator.dtype == torch.float32
    assert operator.matvec(operator.space.randn(0)).dtype == torch.float32


def test_squared_error():
    model, data = mlp(), batches("mlp", (6,))
    targets = torch.randn(6, 3, dtype=torch.float64)
    operator = GGNOperator(model, lambda m, b: (m(b[0]), b[1]), [(data[0][0], targets)], loss="mse")
    oracle = Oracle(copy.deepcopy(model), operator.names, data)
    jacobian = torch.func.jacrev(oracle.logits)(oracle.theta).flatten(0, 1)
    v = next(vectors(operator.size))
    assert relative(operator.matvec(v), 2 * jacobian.T @ (jacobian @ v) / 6) < TOLERANCE
    expected = (oracle.logits(oracle.theta) - targets).square().sum() / 6
    assert operator.loss() == pytest.approx(float(expected), rel=1e-12)


def test_targets_that_do_not_count_and_soft_ones():
    model, data = mlp(), batches("mlp", (6,))
    inputs, labels = data[0]
    v = next(vectors(43))
    masked = torch.where(torch.arange(6) < 4, labels, -100)
    ignoring = GGNOperator(model, forward_fn, [(inputs, masked)])
    first_four = GGNOperator(model, forward_fn, [(inputs[:4], labels[:4])])
    assert ignoring.num_samples == 4
    assert relative(ignoring.matvec(v), first_four.matvec(v)) < TOLERANCE
    assert ignoring.loss() == pytest.approx(first_four.loss(), rel=1e-12)
    soft = GGNOperator(model, forward_fn, [(inputs, torch.nn.functional.one_hot(labels, 3).double())])
    assert relative(soft.matvec(v), GGNOperator(model, forward_fn, data).matvec(v)) < TOLERANCE


def test_label_smoothing_is_in_the_loss_and_its_gradient_and_not_in_gauss_newton():
    model, data = mlp(), batches("mlp")

    def smoothed(network, batch):
        logits, labels = forward_fn(network, batch)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.3), len(labels)

    operator, expected = (
        GGNOperator(model, forward_fn, data, label_smoothing=0.3),
        HessianOperator(model, smoothed, data),
    )
    plain = GGNOperator(model, forward_fn, data)
    assert operator.loss() == pytest.approx(expected.loss(), rel=1e-12)
    assert relative(operator.gradient(), expected.gradient()) < TOLERANCE
    assert relative(operator.gradient(), plain.gradient()) > 0.05
    v = next(iter(vectors(operator.size)))
    assert torch.equal(operator.matvec(v), plain.matvec(v))
    with pytest.raises(UsageError, match=r"label_smoothing=0.3 goes with loss='cross_entropy'"):
        GGNOperator(model, forward_fn, data, loss="mse", label_smoothing=0.3)


def test_both_kinds_of_curvature_of_a_task_are_of_the_loss_that_is_trained():
    config = parse(["--suite", "demo", "train.label_smoothing=0.3"]).config
    model, (inputs, labels) = TaskModel(nn.Linear(4, 5).double(), [nn.Linear(5, 3).double()]), batches("mlp")[0]
    valid, zeros = torch.ones(len(labels)).double(), torch.zeros(len(labels), dtype=torch.long)
    data = [Batch(inputs, labels, valid, zeros, zeros)]
    parameters = dict(model.backbone.named_parameters())
    gradients = [
        task_operator(
            model,
            Objective(0.3),
            data,
            parameters,
            Accelerator(cpu=True),
            dataclasses.replace(curvature_options(config), kind=kind),
        ).gradient()
        for kind in ("hessian", "ggn")
    ]
    assert relative(gradients[1], gradients[0]) < TOLERANCE


def test_a_random_loss_is_one_fixed_function():
    """The same noise in every product, kept graph or not, and whatever the caller draws in between."""

    def noisy(model, batch):
        inputs, labels = batch
        return loss_fn(model, (inputs + torch.randn_like(inputs), labels))

    model, data = mlp(), batches("mlp")
    v = next(vectors(43))
    operators = [HessianOperator(model, noisy, data, retain_graph=keep) for keep in (True, False)]
    first = operators[0].matvec(v)
    torch.rand(7)
    assert torch.equal(operators[0].matvec(v), first)
    assert torch.equal(operators[1].matvec(v), first)


def test_wrong_use_is_refused_in_one_line():
    model, data = mlp(), batches("mlp")
    frozen = mlp().requires_grad_(False)
    space = VectorSpace.of({"other": torch.zeros(43)})
    refused = [
        (lambda: HessianOperator(model, loss_fn, data, method="hessian"), "exact, jvp, finite_difference"),
        (lambda: GGNOperator(model, forward_fn, data, method="finite_difference"), "exact, jvp"),
        (lambda: HessianOperator(model, loss_fn, data, precision="fp8"), "float32, float64, tf32, bf16"),
        (lambda: HessianOperator(model, loss_fn, data, retain_graph="some"), "auto, true, false"),
        (lambda: HessianOperator(model, loss_fn, data, compile=True), "jvp"),
        (lambda: GGNOperator(model, forward_fn, data, loss="hinge"), "cross_entropy, mse"),
        (lambda: HessianOperator(model, loss_fn, iter(data)), "iterator"),
        (lambda: HessianOperator(model, loss_fn, data, space=space), "VectorSpace.of"),
        (lambda: HessianOperator(frozen, loss_fn, data), "requires_grad"),
        (lambda: HessianOperator(model, loss_fn, data, frozen.parameters()), "not the model's"),
        (lambda: HessianOperator(model, loss_fn, []).loss(), "empty on every rank"),
        (lambda: HessianOperator(model, loss_fn, []).matvec(torch.zeros(43)), "empty on every rank"),
        (lambda: HessianOperator(model, loss_fn, data).matvec(torch.zeros(42)), "(43,)"),
        (lambda: HessianOperator(model, lambda m, b: (m(b[0]), 1), data).loss(), "sum over the samples"),
    ]
    for call, hint in refused:
        with pytest.raises(UsageError) as caught:
            call()
        assert hint in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_not_finite_is_named():
    model, data = mlp(), batches("mlp")
    spoiled = [data[0], (data[1][0] / 0, data[1][1])]
    with pytest.raises(RunFailedError, match="loss over the curvature set is nan"):
        HessianOperator(model, loss_fn, spoiled).matvec(torch.zeros(43))

    def cusp(model, batch):  # a finite value whose derivative is not
        return (model(batch[0]).sum() * 0).abs().sqrt(), len(batch[0])

    operator = HessianOperator(model, cusp, data)
    with pytest.raises(RunFailedError, match=r"the gradient is not finite \(first in 0.weight"):
        operator.gradient()
    with pytest.raises(RunFailedError, match=r"curvature product 1 is not finite \(first in 0.weight"):
        operator.matvec(next(vectors(43)))


def test_operator_takes_parameters_when_told():
    model, data = mlp(), batches("mlp")
    operator = HessianOperator(model, loss_fn, data)
    v = next(vectors(43))
    before = operator.matvec(v)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(UsageError, match="refresh"):
        operator.matvec(v)
    operator.refresh()
    after = operator.matvec(v)
    assert relative(after, before) > 1e-2
    assert torch.equal(after, HessianOperator(model, loss_fn, data).matvec(v))


def test_serves_hessian_eigenthings():
    model, data = mlp(), batches("mlp")
    operator = HessianOperator(model, loss_fn, data)
    expected = float(Oracle(copy.deepcopy(model), operator.names, data).hessian().trace())
    estimate = trace(operator, num_matvecs=200, method="hutchinson", seed=0, backend=SpaceBackend(operator.space))
    assert abs(estimate.estimate - expected) < 5 * estimate.stderr


def test_the_density_s_vectors_are_of_the_seed() -> None:
    operator = HessianOperator(mlp(), loss_fn, batches("mlp", (5, 2)))
    first, again, other = (estimate_spectrum(operator, runs=1, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.density, again.density)
    assert first.trace == again.trace
    assert not torch.equal(first.density, other.density)
    assert first.trace != other.trace
