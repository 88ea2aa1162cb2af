"""Networks, data and dense oracles of the curvature tests: float64, and small enough for a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.resnet import BasicBlock
from transformers import ViTConfig, ViTModel

CLASSES = 3
Batch = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """A backbone under a linear head; transformers' backbones give their class token."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        if not isinstance(features, Tensor):
            features = features.last_hidden_state[:, 0]
        return self.head(features)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, CLASSES)).double()


def vit(lora: bool = False, dropout: float = 0.1) -> nn.Module:
    """transformers' ViT for 8 pixel images, by choice with adapters whose B is no longer zero."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    backbone: nn.Module = ViTModel(config, add_pooling_layer=False)
    if lora:
        adapters = LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
        backbone = get_peft_model(backbone, adapters)
    model = Classifier(backbone, 16).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def resnet() -> nn.Module:
    """torchvision's residual blocks at width 2 and 4, with batch statistics as after training."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(2, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4))
    backbone = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        BasicBlock(2, 2),
        BasicBlock(2, 4, stride=2, downsample=down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = Classifier(backbone, 4).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


NETWORKS = {"mlp": mlp, "vit": vit, "vit_lora": lambda: vit(lora=True), "resnet": resnet}


def batches(kind: str, sizes: Sequence[int] = (5, 2), seed: int = 1) -> list[Batch]:
    """Unequal batches of inputs in float32 and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4,) if kind == "mlp" else (3, 8, 8)
    return [
        (torch.randn(n, *shape, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator))
        for n in sizes
    ]


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def forward_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs, labels = batch
    return model(inputs), labels


def scope(kind: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a test is about: few enough for a whole matrix, from several layers."""
    wanted = {"mlp": "", "vit": "layers.0.attention", "vit_lora": "lora_", "resnet": ""}[kind]
    return {name: p for name, p in model.named_parameters() if wanted in name}


class Oracle:
    """Loss, gradient, Hessian and Gauss-Newton matrix of the union of all batches, dense, by torch.func alone.

    ``model`` is in float64; it is put in evaluation mode.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], data: Sequence[Batch]) -> None:
        self.model = model.eval()
        own = dict(model.named_parameters())
        self.shapes = [own[name].shape for name in names]
        self.names = tuple(names)
        self.theta = torch.cat([own[name].detach().reshape(-1) for name in names])
        self.inputs = torch.cat([inputs for inputs, _ in data]).double()
        self.labels = torch.cat([labels for _, labels in data])

    def logits(self, theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in self.shapes])
        values = {name: p.view(s) for name, p, s in zip(self.names, parts, self.shapes, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(self.model, values, (self.inputs,))

    def mean_loss(self, theta: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(theta), self.labels)

    def loss(self) -> float:
        return float(self.mean_loss(self.theta).detach())

    def gradient(self) -> Tensor:
        return torch.func.grad(self.mean_loss)(self.theta).detach()

    def hessian(self) -> Tensor:
        # Not torch.func.hessian: its jacfwd(jacrev) is off by 0.3 % in layer norm's weights (torch 2.14).
        return torch.func.jacfwd(torch.func.grad(self.mean_loss))(self.theta).detach()

    def gauss_newton(self) -> Tensor:
        jacobian = torch.func.jacrev(self.logits)(self.theta).flatten(0, 1)  # (N C, P)
        p = self.logits(self.theta).softmax(dim=1)
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return (jacobian.T @ torch.block_diag(*blocks) @ jacobian / len(p)).detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


def vectors(size: int, number: int = 3, seed: int = 5) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield torch.randn(size, generator=generator, dtype=torch.float64)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All of a model that an operator must leave alone, as comparable values."""
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": torch.random.get_rng_state(),
    }


def assert_same(before: Any, after: Any) -> None:
    """Equality to the bit of nested fingerprints."""
    if isinstance(before, Tensor):
        before, after = (t.to_local() if hasattr(t, "to_local") else t for t in (before, after))
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert_same(value, after[key])
    elif isinstance(before, list):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after
