"""A product leaves nothing behind: not in the model, not in torch's global state, whatever happens."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nostalgia.curvature import GGNOperator, HessianOperator
from nostalgia.curvature.context import float32_products, product_context, use_twice_differentiable_attention
from nostalgia.parallel.modules import skeleton
from tests.unit.curvature.networks import (
    assert_same,
    batches,
    fingerprint,
    forward_fn,
    loss_fn,
    mlp,
    relative,
    resnet,
    scope,
    vectors,
    vit,
)

FLAGS: dict[str, Any] = {
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "cudnn.rnn": torch.backends.cudnn.rnn,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
}


def readable(read) -> Any:
    """A flag's value, or that torch refuses to say."""
    try:
        return read()
    except RuntimeError:
        return "refused"


def global_state() -> dict[str, Any]:
    state: dict[str, Any] = {name: flag.fp32_precision for name, flag in FLAGS.items()}
    state["older matmul"] = readable(lambda: torch.backends.cuda.matmul.allow_tf32)
    state["older cudnn"] = readable(lambda: torch.backends.cudnn.allow_tf32)
    state["precision"] = readable(torch.get_float32_matmul_precision)
    state["autocast"] = torch.is_autocast_enabled("cpu")
    state["kernels"] = [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]
    state["grad"] = torch.is_grad_enabled()
    return state


@pytest.fixture
def flags():
    """torch's precision flags as a new process has them, and as they were afterwards."""
    saved = {name: flag.fp32_precision for name, flag in FLAGS.items()}
    older, cudnn = readable(torch.get_float32_matmul_precision), readable(lambda: torch.backends.cudnn.allow_tf32)
    restore(dict.fromkeys(FLAGS, "none") | {"cudnn.conv": "tf32", "cudnn.rnn": "tf32"}, "highest", True)
    yield
    restore(saved, "highest" if older == "refused" else older, cudnn is not False)


def restore(values: dict[str, str], older: str, cudnn: bool) -> None:
    torch.set_float32_matmul_precision(older)
    torch.backends.cudnn.allow_tf32 = cudnn
    for name, value in values.items():
        FLAGS[name].fp32_precision = value


class Interrupted(Exception):
    pass


def failing(model, batch):
    loss, samples = loss_fn(model, batch)
    if samples == 2:  # the second batch
        raise Interrupted
    return loss, samples


def lively(kind: str) -> nn.Module:
    """A network in training mode, some parts in evaluation mode, with gradients, some parameters frozen."""
    model = resnet() if kind == "resnet" else vit()
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("method", HessianOperator.METHODS)
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_model_and_global_state_stay(kind, method):
    model, data = lively(kind), batches(kind)
    torch.manual_seed(3)
    before, around = fingerprint(model), global_state()
    for precision in ("float32", "tf32", "bf16"):
        if (method, precision) == ("finite_difference", "bf16"):
            continue  # noise, and refused as such
        operator = HessianOperator(model, loss_fn, data, method=method, precision=precision)
        for product in (operator.loss, operator.gradient, lambda op=operator: op.matvec(op.space.randn(0))):
            product()
            assert_same(before, fingerprint(model))
            assert global_state() == around


@pytest.mark.parametrize("method", HessianOperator.METHODS)
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_model_and_global_state_stay_when_the_loss_raises(kind, method):
    model, data = lively(kind), batches(kind)
    torch.manual_seed(3)
    before, around = fingerprint(model), global_state()
    healthy = HessianOperator(model, loss_fn, data, method=method)
    operator = HessianOperator(model, failing, data, method=method, precision="bf16")
    operator._totals = healthy._measured()  # past the first pass, which would raise before any product
    for product in (operator.gradient, lambda: operator.matvec(operator.space.randn(0))):
        with pytest.raises(Interrupted):
            product()
        assert_same(before, fingerprint(model))
        assert global_state() == around


def test_products_do_not_follow_the_surroundings(flags):
    """Training's autocast, its TF32 flags and its attention kernels do not reach into a product."""
    model, data = vit().float(), batches("vit")
    operators = [HessianOperator(model, loss_fn, data), GGNOperator(model, forward_fn, data)]
    v = operators[0].space.randn(0)
    expected = [operator.matvec(v) for operator in operators]
    torch.set_float32_matmul_precision("medium")
    for operator in operators:
        operator.refresh()
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        assert [torch.equal(o.matvec(v), e) for o, e in zip(operators, expected, strict=True)] == [True, True]
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"older": "high"},
        {"older": "high", "cuda.matmul": "ieee"},
        {"cuda.matmul": "tf32"},
        {"cudnn.conv": "ieee", "cudnn.rnn": "ieee"},
        {"cuda.matmul": "ieee", "cudnn.conv": "ieee"},
        {"mkldnn.matmul": "bf16"},
    ],
)
def test_precision_flags_come_back_even_where_the_spellings_disagree(flags, settings):
    for name, value in settings.items():
        if name == "older":
            torch.set_float32_matmul_precision(value)
        else:
            FLAGS[name].fp32_precision = value
    before = global_state()
    for tf32, name in ((True, "tf32"), (False, "ieee")):
        with float32_products(tf32=tf32):
            assert {flag.fp32_precision for flag in FLAGS.values()} == {name}
            assert torch.backends.cuda.matmul.allow_tf32 is tf32  # Inductor reads these
            assert torch.backends.cudnn.allow_tf32 is tf32
        assert global_state() == before


def test_context_is_left_by_an_exception():
    around, random = global_state(), torch.random.get_rng_state()

    def draw_and_raise():
        with product_context("bf16", torch.device("cpu")):
            torch.rand(3)
            raise Interrupted

    with pytest.raises(Interrupted):
        draw_and_raise()
    assert global_state() == around
    assert torch.equal(torch.random.get_rng_state(), random)


def test_buffers_written_in_a_forward_are_the_operator_s_own():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    model = Counting()
    HessianOperator(model, loss_fn, batches("mlp"), precision="float64").matvec(next(vectors(43)))
    assert float(model.calls) == 0


def test_attention_without_a_second_derivative_is_replaced_in_the_product_only():
    model, fused, data = vit(), vit(), batches("vit")
    expected = HessianOperator(model, loss_fn, data, scope("vit", model))
    v = next(vectors(expected.size))
    fused.backbone.config._attn_implementation_internal = "flash_attention_2"
    found = HessianOperator(fused, loss_fn, data, scope("vit", fused)).matvec(v)
    assert relative(found, expected.matvec(v)) == 0.0
    configs = {id(m.config): m.config for m in fused.modules() if hasattr(m, "config")}
    assert [config._attn_implementation for config in configs.values()] == ["flash_attention_2"]
    bones = skeleton(fused)
    use_twice_differentiable_attention(bones)
    assert len({id(m.config) for m in bones.modules() if hasattr(m, "config")}) == 1


@pytest.mark.parametrize("method", HessianOperator.METHODS)
def test_memory_goes_with_the_operator(method):
    """No cycle holds graphs and gathered parameters until some later garbage collection."""
    operator = HessianOperator(mlp(), loss_fn, batches("mlp"), method=method)
    operator.matvec(next(vectors(43)))
    held = weakref.ref(operator._network)
    gc.disable()
    try:
        del operator
        assert held() is None
    finally:
        gc.enable()
