"""Networks and data of the benchmarks: real digits through small or full-size vision backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models.backbones import build_backbone

Batch = tuple[Tensor, Tensor]
CLASSES = 10

VIT_TINY = {
    "model_type": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# What builds each backbone, without weights from anywhere.
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"framework": "hf", "config": VIT_TINY},
    "vit_s16": {
        "framework": "hf",
        "config": {
            "model_type": "vit",
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
        },
    },
    "vit_b16": {"framework": "hf", "config": {"model_type": "vit"}},
    "resnet18": {"framework": "torchvision", "arch": "resnet18", "image_size": 224},
    "resnet50": {"framework": "torchvision", "arch": "resnet50", "image_size": 224},
}


class Classifier(nn.Module):
    """A backbone under a linear head: images (B, 3, S, S) -> logits (B, 10)."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self.backbone = build_backbone(pretrained=False, seed=seed, **MODELS[name])
        self.image_size = self.backbone.image_size
        torch.manual_seed(seed)
        self.head = nn.Linear(self.backbone.feature_dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy summed over a batch, and its number of samples."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


def forward_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    images, labels = batch
    return model(images), labels


def digits(image_size: int, count: int, seed: int) -> Batch:
    """``count`` of scikit-learn's 1,797 digits, chosen by ``seed``: images (N, 3, S, S) in [-1, 1], labels (N,)."""
    data = load_digits()
    if not 1 <= count <= len(data.target):
        raise UsageError(f"--num-samples {count}: allowed is 1 to {len(data.target)}, all of scikit-learn's digits")
    chosen = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))[:count]
    images = torch.from_numpy(data.images).float()[chosen, None] / 8 - 1
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target)[chosen]


def split(data: Batch, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """This rank's share in batches of at most ``batch_size``."""
    images, labels = (part.tensor_split(world_size)[rank] for part in data)
    if len(labels) == 0:
        return []
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def train(model: nn.Module, data: Batch, epochs: int, seed: int, batch_size: int = 64) -> float:
    """A few epochs of AdamW on all of ``data``; returns the accuracy on it, in evaluation mode afterwards."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def trained(name: str, data: Batch, epochs: int, seed: int, cache: Path | None) -> tuple[Classifier, float]:
    """A trained network and its training accuracy; with ``cache`` its weights are kept there and read next time."""
    model = Classifier(name, seed)
    if cache is not None and cache.exists():
        try:
            model.load_state_dict(torch.load(cache, weights_only=True))
        except (OSError, RuntimeError, ValueError) as error:
            raise NotFoundError(
                f"--cache {cache}: not the weights of {name} ({str(error).splitlines()[0]}); delete it to train anew"
            ) from None
        epochs = 0
    accuracy = train(model, data, epochs, seed)
    if cache is not None and epochs:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), cache)
    return model, accuracy
