"""Curvature products on every placement, against the dense matrices of one process, in float64."""

from __future__ import annotations

import copy

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTModel

from nostalgia import GGNOperator, HessianOperator, lanczos

SHARES = {1: [0, 11], 2: [0, 11, 11], 3: [0, 7, 7, 11]}  # unequal, and an empty rank


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, hidden_dropout_prob=0.1,
        )  # fmt: skip
        vit = ViTModel(config, add_pooling_layer=False)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        self.vit = peft.get_peft_model(vit, lora)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.vit(images).last_hidden_state[:, 0])

    def layers(self) -> list[nn.Module]:
        return list(self.vit.base_model.model.layers)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def layers(self) -> list[nn.Module]:
        return [self.a]


def dense(model: nn.Module, names: list[str], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and Gauss-Newton matrix of the mean cross-entropy, by autodiff of the flat parameters."""
    own = {n: p.detach() for n, p in model.named_parameters()}
    shapes = [own[n].shape for n in names]
    flat = torch.cat([own[n].reshape(-1) for n in names])

    def logits(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        scope = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return functional_call(model, {**own, **scope}, (x,))

    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.func.hessian(lambda theta: F.cross_entropy(logits(theta), y))(flat)
        jacobian = torch.func.jacrev(logits)(flat)
        p = logits(flat).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return hessian, torch.einsum("bip,bij,bjq->pq", jacobian, curvature, jacobian) / len(x)


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(model)
    if wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def check_products() -> dict[str, float]:
    """Every operator, method and wrapping: products equal the dense ones, with two large collectives each."""
    world, rank = dist.get_world_size(), dist.get_rank()
    errors = {}
    for kind, shape in ((Mlp, (7,)), (Vit, (3, 8, 8))):
        torch.manual_seed(1)
        original = kind().double()
        x, y = torch.randn(11, *shape, dtype=torch.float64), torch.randint(0, 3, (11,))
        names = [n for n, p in original.named_parameters() if p.requires_grad and not n.startswith("head")]
        oracles = dense(copy.deepcopy(original).eval(), names, x, y)
        low, high = SHARES[world][rank : rank + 2]
        batches = [(x[i : min(i + 4, high)], y[i : min(i + 4, high)]) for i in range(low, high, 4)]
        for wrap in ("plain", "ddp", "fsdp2"):
            model = wrapped(copy.deepcopy(original).train(), wrap)
            own = dict((model.module if wrap == "ddp" else model).named_parameters())
            scope = {n: own[n] for n in names}
            for operator, method, oracle in operators(model, batches, scope, oracles):
                space = operator.space
                v = space.randn(3)
                expected = space.slice_flat((oracle @ space.gather_flat(v[None])[0])[None])[0]
                operator.matvec(v)
                before = space.traffic.snapshot()
                result = operator.matvec(v)
                moved = space.traffic.since(before)
                if method != "finite_difference" and world > 1:
                    assert (moved.large, moved.small) == (2, 0), (wrap, method, moved)
                error = float(space.norm(result - expected) / space.norm(expected))
                errors[f"{kind.__name__} {wrap} {type(operator).__name__} {method}"] = error
            assert model.training and all(p.grad is None for p in model.parameters())
    return errors


def operators(model: nn.Module, batches: list, scope: dict, oracles: tuple[Tensor, Tensor]):
    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(m(batch[0]), batch[1], reduction="sum"), len(batch[1])

    for method in ("exact", "jvp", "finite_difference"):
        yield HessianOperator(model, loss_fn, batches, scope, method=method), method, oracles[0]
    for method in ("exact", "jvp"):
        yield GGNOperator(model, lambda m, b: (m(b[0]), b[1]), batches, scope, method=method), method, oracles[1]


def check_eigenpairs() -> dict[str, list[float]]:
    """Top eigenvalues of the Hessian, and the worst true residual, on every wrapping."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    original = Mlp().double()
    x, y = torch.randn(11, 7, dtype=torch.float64), torch.randint(0, 3, (11,))
    names = [n for n, _ in original.named_parameters()]
    oracle = torch.linalg.eigvalsh(dense(original, names, x, y)[0]).flip(0)[:4]
    low, high = SHARES[world][rank : rank + 2]
    found = {}
    for wrap in ("ddp", "fsdp2"):
        model = wrapped(copy.deepcopy(original), wrap)
        operator = next(operators(model, [(x[low:high], y[low:high])] if high > low else [], None, (x, x)))[0]
        pairs = lanczos(operator, 4, tol=1e-9, true_residuals=True)
        assert bool(pairs.converged.all())
        found[wrap] = [float((pairs.eigenvalues - oracle).abs().max()), float(pairs.residuals.max())]
    return found
