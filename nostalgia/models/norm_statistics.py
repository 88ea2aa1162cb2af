"""Batch-norm running statistics over tasks: they drift with every later task, and forget by themselves.

``model.norm_statistics``: ``per_task`` evaluates each task with the statistics it was trained with,
``frozen`` never updates the pretrained ones, ``shared`` lets them drift. A set of statistics is a plain
mapping from buffer name (relative to the backbone) to tensor, so that it is saved as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nostalgia.errors import NotFoundError
from nostalgia.models.backbone import Backbone
from nostalgia.parallel.modules import normalise_alone
from nostalgia.utils.tensor_files import read_tensors


def has_batch_norm(backbone: nn.Module) -> bool:
    """Whether ``backbone`` keeps running statistics."""
    return any(True for _ in _layers(backbone))


def capture(backbone: nn.Module) -> dict[str, Tensor]:
    """Copies of all running means (C,), variances (C,) and batch counts (0-dim), on the CPU."""
    return {name: buffer.detach().cpu().clone() for name, buffer in _buffers(backbone).items()}


@torch.no_grad()
def apply(backbone: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Put ``statistics`` into ``backbone``, in place; raises NotFoundError for another network's."""
    buffers = _buffers(backbone)
    if set(buffers) != set(statistics):
        odd = sorted(set(buffers) ^ set(statistics))
        raise NotFoundError(f"batch-norm statistics of another network: {len(odd)} names differ ({', '.join(odd[:3])})")
    for name, buffer in buffers.items():
        if statistics[name].shape != buffer.shape:
            shapes = f"{tuple(statistics[name].shape)}, not {tuple(buffer.shape)}"
            raise NotFoundError(f"batch-norm statistics of another network: {name} has shape {shapes}")
    for name, buffer in buffers.items():
        buffer.copy_(statistics[name])


@contextmanager
def using(backbone: nn.Module, statistics: Mapping[str, Tensor] | None) -> Iterator[None]:
    """``backbone`` with ``statistics`` within the block, and with its own after it; None changes nothing."""
    if statistics is None:
        yield
        return
    own = capture(backbone)
    apply(backbone, statistics)
    try:
        yield
    finally:
        apply(backbone, own)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Running statistics of ``model``, in whatever mode it is, are as they were after the block."""
    buffers = _buffers(model)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(before[name])


def freeze(backbone: Backbone, frozen: bool = True) -> None:
    """Keep batch-norm layers in evaluation mode, whatever ``train()`` says later: no updates."""
    backbone.norm_frozen = frozen
    backbone.train(backbone.training)


@torch.no_grad()
def measure_anew(backbone: Backbone, batches: Iterable[Tensor]) -> None:
    """Put the statistics of ``batches``, images (B, C, H, W) of this rank, in place of the running ones, the mean over batches
    and ranks: after weights were changed without training. Nothing where they are frozen, or there are none.

    A collective, though ranks may have other numbers of batches; a batch of one image is left out, which batch norm cannot
    normalise by itself.
    """
    layers = [layer for _, layer in _layers(backbone)]
    if not layers or backbone.norm_frozen:
        return
    usable = [images for images in batches if len(images) > 1]
    training, momenta = backbone.training, [layer.momentum for layer in layers]
    backbone.eval()
    for layer in layers if usable else ():  # a rank without any keeps what it had
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
        normalise_alone(layer)  # ranks may have fewer batches
    for images in usable:
        backbone(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        vars(layer).pop("forward", None)
    backbone.train(training)
    average_over_ranks(backbone, len(usable))


@torch.no_grad()
def average_over_ranks(backbone: nn.Module, share: float = 1.0, group: dist.ProcessGroup | None = None) -> None:
    """Make every rank's statistics those of all ranks' batches together; one all-reduce, no-op on one process.

    With m_r, v_r a rank's mean and variance: ``m = mean_r m_r`` and ``v = mean_r (v_r + m_r^2) - m^2`` (the variances' own
    average would lack the spread of the means), each rank with weight ``share``, by default alike; where all are 0 nothing
    changes. All ranks must call it.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    buffers = _buffers(backbone)
    own_means = [value for name, value in buffers.items() if name.endswith(".running_mean")]
    own_variances = [value for name, value in buffers.items() if name.endswith(".running_var")]
    if not own_means:
        return
    means = torch.cat(own_means).double()  # (channels of all layers,)
    variances = torch.cat(own_variances).double()
    moments = share * torch.stack([means, variances + means.square(), torch.ones_like(means)])
    dist.all_reduce(moments, group=group)
    if not bool(moments[2, 0]):
        return
    mean, square = moments[:2] / moments[2]
    variance = (square - mean.square()).clamp_min(0)
    sizes = [len(value) for value in own_means]
    for values, result in ((own_means, mean), (own_variances, variance)):
        for value, part in zip(values, result.split(sizes), strict=True):
            value.copy_(part)


def save_statistics(statistics: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    """Write the statistics of every task to one safetensors file, under ``<task>/<buffer>``."""
    tensors = {
        f"{task}/{name}": tensor.detach().cpu().contiguous()
        for task, values in statistics.items()
        for name, tensor in values.items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def load_statistics(file: Path) -> dict[str, dict[str, Tensor]]:
    """Read what ``save_statistics`` wrote, by task; raises NotFoundError when it cannot be read."""
    tensors = read_tensors(file, "batch-norm statistics")
    statistics: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        task, _, name = key.rpartition("/")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise NotFoundError(f"{file}: {key[:80]!r} holds a negative variance")
        statistics.setdefault(task, {})[name] = tensor
    return statistics


def synchronise(backbone: Backbone) -> None:
    """Let batch-norm layers normalise by the batch of all ranks (SyncBatchNorm, which needs GPUs).

    Call it before the model is wrapped; parameters and statistics stay the same tensors.
    """
    backbone.model = nn.SyncBatchNorm.convert_sync_batchnorm(backbone.model)


def _layers(backbone: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in backbone.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def _buffers(backbone: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, layer in _layers(backbone)
        for key, buffer in layer.named_buffers(recurse=False)
    }
