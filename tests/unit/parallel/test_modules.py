"""Wrappers come off, copies behave as the original, and the original does not notice."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

from nostalgia.parallel.modules import (
    bare_module,
    inner_module,
    is_sharded,
    named_parameters,
    reshard,
    skeleton,
    unpatched,
    whole_state,
)
from tests.unit.curvature.networks import assert_same, fingerprint, mlp, vit

NETWORKS = {
    "mlp": (mlp, (4,)),
    "vit": (vit, (3, 8, 8)),
    "vit_lora": (lambda: vit(lora=True), (3, 8, 8)),
    "resnet18": (lambda: resnet18(num_classes=3).double(), (3, 16, 16)),
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A process group of one rank: enough for DDP and FSDP2 to wrap."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def accelerator():
    """Mixed precision as in training; Accelerate's state is as it was before, afterwards."""
    states = (AcceleratorState, PartialState, GradientState)
    before = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    for state, values in zip(states, before, strict=True):
        state._shared_state.clear()
        state._shared_state.update(values)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def evaluate(bones: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(bones.eval(), values, (x,))


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("wrap", ["bare", "ddp", "fsdp2", "accelerate", "compile"])
def test_skeleton_computes_what_the_network_computes(kind, wrap, accelerator):
    make, shape = NETWORKS[kind]
    original = make()
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected = copy.deepcopy(original).eval()(x)
    names = [name for name, _ in original.named_parameters()]
    trainable = [p.requires_grad for p in original.parameters()]
    wrappers = {
        "bare": lambda m: m,
        "ddp": DistributedDataParallel,
        "fsdp2": shard,
        "accelerate": accelerator.prepare_model,
        "compile": torch.compile,
    }
    model = wrappers[wrap](original)
    before = fingerprint(model)
    bones, values = skeleton(model), whole_state(model)
    assert list(named_parameters(model)) == names
    assert [name for name, _ in bones.named_parameters()] == names
    assert {t.device.type for t in (*bones.parameters(), *bones.buffers())} == {"meta"}
    assert not any(isinstance(p, DTensor) for p in bones.parameters())
    assert [p.requires_grad for p in bones.parameters()] == trainable
    torch.testing.assert_close(evaluate(bones, values, x), expected, rtol=1e-12, atol=1e-12)
    assert_same(before, fingerprint(model))


def test_skeleton_of_a_network_that_has_run_and_has_hooks():
    """transformers installs hooks on first use; the user's own stay and see the copy."""
    model, seen = vit(), []
    model.backbone(torch.zeros(1, 3, 8, 8).double(), output_hidden_states=True)
    model.head.register_forward_hook(lambda module, args, output: seen.append(module))
    bones = skeleton(model)
    evaluate(bones, whole_state(model), torch.zeros(1, 3, 8, 8).double())
    assert seen == [bones.head]
    handles = len(model.head._forward_hooks)
    bones.head.register_forward_hook(lambda module, args, output: None)
    assert len(model.head._forward_hooks) == handles


class Knotted(nn.Module):
    """Refers to its submodules in all the ways people do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.plain = [self.first, {"second": self.second}]
        self.again = self.plain
        self.method = self.double_first
        self.call = partial(self.apply_to, self.second)
        self.pair = (self.first, 3)
        self.alias = self.first.bias
        self.shared = object()
        self.seen: list[int] = []
        self.first.register_forward_pre_hook(self.hook)
        object.__setattr__(self.first, "parent", self)

    def double_first(self, x: Tensor) -> Tensor:
        return 2 * self.first(x)

    def apply_to(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def hook(self, module: nn.Module, args: tuple) -> None:
        self.seen.append(id(module))

    def forward(self, x: Tensor) -> Tensor:
        return self.method(x) + self.call(x) + self.plain[1]["second"](x)


def test_references_point_into_the_copy():
    model = Knotted()
    bones = skeleton(model)
    assert bones.plain[0] is bones.pair[0] is bones.first
    assert bones.plain[1]["second"] is bones.second is bones.call.args[0]
    assert bones.again is bones.plain is not model.plain
    assert bones.method.__self__ is bones.first.parent is bones
    assert bones.alias is bones.first.bias
    assert bones.second.weight is bones.first.weight
    assert bones.shared is model.shared
    x = torch.randn(3, 2)
    torch.testing.assert_close(functional_call(bones, whole_state(model), (x,)), model(x))
    assert bones.seen == [id(bones.first)]
    assert model.seen == [id(model.first)]


def test_accelerate_s_patch_comes_off(accelerator):
    original = mlp().float()
    x = torch.randn(2, 4)
    expected = copy.deepcopy(original).eval()(x)
    model = accelerator.prepare_model(original).eval()
    assert not torch.equal(model(x), expected)
    with unpatched(model):
        assert torch.equal(inner_module(model)(x), expected)
    assert not torch.equal(model(x), expected)
    with pytest.raises(ZeroDivisionError), unpatched(model):
        raise ZeroDivisionError
    assert not torch.equal(model(x), expected)
    bare = bare_module(model)
    assert bare is inner_module(model)
    assert torch.equal(bare(x), expected)
    assert "forward" not in bare.__dict__
    assert not torch.equal(accelerator.prepare_model(bare).eval()(x), expected)  # can be prepared again


def test_a_forward_of_the_user_s_own_survives_the_patch(accelerator):
    model = mlp().float()
    model.forward = lambda x: x.sum()
    x = torch.randn(2, 4)
    prepared = accelerator.prepare_model(model)
    assert torch.equal(skeleton(prepared)(x), x.sum())
    assert torch.equal(bare_module(prepared)(x), x.sum())


@pytest.mark.parametrize("kind", ["mlp", "vit_lora", "resnet18"])
def test_fsdp2_comes_off(kind):
    make, shape = NETWORKS[kind]
    original = make().train()
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected = copy.deepcopy(original).eval()(x)
    state = {name: t.clone() for name, t in original.state_dict().items()}
    flags = [p.requires_grad for p in original.parameters()]
    model = shard(original)
    bare = bare_module(model)
    assert is_sharded(model)
    assert not is_sharded(bare)
    assert not any(isinstance(module, FSDPModule) for module in bare.modules())
    assert_same(state, dict(bare.state_dict()))
    assert [p.requires_grad for p in bare.parameters()] == flags
    assert all(module.training for module in bare.modules())
    torch.testing.assert_close(bare.eval()(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        next(bare.parameters()).add_(1)  # its values are its own
    assert_same(next(iter(state.values())), next(model.parameters()))
    assert is_sharded(shard(bare))  # can be sharded again


def test_shards_are_found_after_an_evaluation_left_the_root_whole():
    model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,)))
    before = list(named_parameters(model).values())
    with torch.no_grad():
        model.eval()(torch.zeros(1, 4, dtype=torch.float64))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    after = named_parameters(model)
    assert all(isinstance(p, DTensor) for p in after.values())
    assert [id(p) for p in after.values()] == [id(p) for p in before]
    reshard(mlp())  # nothing to do for an ordinary module


def test_names_do_not_say_how_a_part_is_wrapped():
    plain, model = vit(), vit()
    layers = model.backbone.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1] = torch.compile(layers[1], backend="eager")
    assert list(named_parameters(model)) == [name for name, _ in plain.named_parameters()]
    assert list(whole_state(model)) == list(whole_state(plain))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(evaluate(skeleton(model), whole_state(model), x), plain.eval()(x))


def test_wrapped_in_several_layers():
    model = mlp()
    assert inner_module(torch.compile(DistributedDataParallel(model))) is model
    assert inner_module(DistributedDataParallel(torch.compile(model))) is model
