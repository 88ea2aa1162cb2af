"""Kronecker factors against curvlinops' KFAC: an implementation of others of the same definition ("expand", exact metric)."""

from __future__ import annotations

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ViTConfig, ViTForImageClassification

from nostalgia import kronecker_factors

CLASSES = 3


class Logits(nn.Module):
    """A transformers classifier as a module of tensors alone, as curvlinops calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def vit() -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**shape, image_size=16, patch_size=8, num_labels=CLASSES, attn_implementation="sdpa")
    return Logits(ViTForImageClassification(config))


def resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


@pytest.mark.parametrize("make", [vit, resnet], ids=["ViT", "ResNet"])
def test_the_factors_of_every_weight_are_those_of_curvlinops(make: object) -> None:
    """Not compared, since it defines them otherwise or not at all: biases (it takes all of G, here its diagonal), norms,
    embeddings and adapters; drawn cotangents (labels there, any vectors with E u u^T = M here); temperatures."""
    torch.manual_seed(0)
    model = make().double().eval()  # type: ignore[operator]
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    images, labels = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.randint(CLASSES, (10,))
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)

    ours = kronecker_factors(
        model, lambda m, batch: (m(batch[0]), batch[1]), batches, weights, exact=True, precision="float64"
    )
    theirs = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(weights.values()), batches, fisher_type="type-2", check_deterministic=False
    )

    vectors = [torch.randn_like(weight) for weight in weights.values()]
    found = ours.space.gather(ours.matvec(ours.space.take(iter(vectors))))
    assert {name for layer in ours.layers for name in layer.parameters} == set(weights)
    for name, product, expected in zip(ours.space.names, found, theirs @ vectors, strict=True):
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()), msg=name)
