"""Gradient projection memory: each layer's weights move only across the inputs of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.curvature.layers import has_rows, input_rows
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.models.task_model import TaskModel
from nostalgia.options import option
from nostalgia.parallel.tensors import local, world_size


@dataclass(frozen=True)
class GpmConfig:
    threshold: float = option(
        0.97, "Share of a layer's squared inputs that its span must hold; 0: nothing.", low=0, high=1
    )
    num_samples: int = option(256, "Training images of a finished task that its inputs are taken of.", low=1)
    others: str = option(
        "freeze", "Biases, norms and whatever has no inputs of its own, after task 1.", choices=("freeze", "free")
    )


class Gpm(Method):
    """dW <- dW (I - M M^T) for the optimizer's step dW of each layer, M an orthonormal basis of its inputs in earlier tasks.

    After a task the residual of its inputs outside M adds its leading directions, until M holds ``threshold`` of their
    squares. Saha, Garg and Roy 2021, https://arxiv.org/abs/2103.09762; on the step, as Adam-NSCL (Wang et al. 2021) has it,
    since Adam's step leaves the projected gradient's space. LoRA's A and B are linear layers of their own; convolutions
    take the patches they see. Remembers at most i x i numbers a layer of i inputs.
    """

    name = "gpm"
    Config = GpmConfig
    strengths = (0.9, 0.95, 0.97, 0.99, 0.999)
    strength_option = "threshold"

    def __init__(self, config: GpmConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.spans: dict[str, Tensor] = {}  # name of a weight in scope -> (i, m) orthonormal columns

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        if not self.spans:
            optimizer.step()
            return
        mine = {name: local(p) for name, p in self.task.parameters.items()}
        before = {name: tensor.clone() for name, tensor in mine.items()}
        optimizer.step()
        for name, tensor in mine.items():
            if name in self.spans:
                change = (tensor - before[name]).flatten(1)
                span = self.spans[name]
                tensor.copy_(before[name] + (change - (change @ span) @ span.T).view(tensor.shape))
            elif self.config.others == "freeze":
                tensor.copy_(before[name])

    @torch.no_grad()
    def end_task(self, task: TaskContext) -> None:
        if self.config.threshold == 0 or not task.wants_curvature:
            return
        grown = {}
        moments = self._input_moments(task)
        for number, (name, moment) in enumerate(moments.items()):
            task.pause(number, number, len(moments), label="layers")  # wide convolutions take a minute each on a CPU
            span = grown_span(self.spans.get(name), moment, self.config.threshold)
            grown[name] = span.to(task.parameters[name].dtype)
        self.spans.update(grown)

    def _input_moments(self, task: TaskContext) -> dict[str, Tensor]:
        """X X^T (i, i) in float64 of each layer's inputs X over the samples of all ranks."""
        model = task.model
        assert isinstance(model, TaskModel)
        layers = dict(layers_of(model.backbone, task.parameters))
        moments = {name: torch.zeros(_inputs(m), _inputs(m), dtype=torch.float64) for name, m in layers.items()}
        moments = {name: m.to(task.accelerator.device) for name, m in moments.items()}

        def note(name: str) -> Any:
            def hook(module: nn.Module, arguments: Any, keywords: Any) -> None:
                given = arguments[0] if arguments else next(iter(keywords.values()))
                x = input_rows(module, given, len(given)).double().flatten(0, 1)
                moments[name] += x.T @ x

            return hook

        handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in layers.items()]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            for batch in task.samples(self.config.num_samples):
                model(batch.images)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes:
                module.training = mode
        found = {name: task.accelerator.reduce(moment, "sum") for name, moment in moments.items()}
        # A weight that is read without a call of its layer has no inputs here: it is one of the others.
        return {name: moment for name, moment in found.items() if float(moment.trace()) > 0}

    def metrics(self) -> dict[str, float]:
        if not self.spans:
            return {}
        return {
            "span_share": sum(s.shape[1] for s in self.spans.values()) / sum(s.shape[0] for s in self.spans.values())
        }

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        shapes = [s for n, s in zip(space.names, space.shapes, strict=True) if n.endswith(".weight") and len(s) > 1]
        numbers = sum(shape[1:].numel() ** 2 for shape in shapes)
        return MemoryPlan(world_size() * numbers * space.dtype.itemsize, f"at most all inputs of {len(shapes)} layers")

    def bytes_remembered(self) -> int:
        return world_size() * sum(span.numel() * span.element_size() for span in self.spans.values())

    def state_dict(self) -> dict[str, Any]:
        return {"spans": self.spans}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.spans = dict(state["spans"])


def layers_of(backbone: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Module]]:
    """The linear and plain convolution layers whose weight is in scope, by the weight's name."""
    for name, module in backbone.named_modules():
        if has_rows(module) and f"{name}.weight" in parameters:
            yield f"{name}.weight", module


def grown_span(span: Tensor | None, moment: Tensor, threshold: float) -> Tensor:
    """``span`` (i, m) and leading directions of ``moment`` (i, i) outside it, until it holds ``threshold`` of the trace."""
    size = moment.shape[0]
    held = moment.new_zeros(size, 0) if span is None else span.to(moment.dtype)
    total = moment.trace()
    seen = moment @ held  # (i, m)
    within = held.T @ seen
    crossed = held @ seen.T
    outside = moment - crossed - crossed.T + held @ within @ held.T  # (I - H H^T) M (I - H H^T)
    values, vectors = torch.linalg.eigh(outside)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    share = (within.trace() + torch.cat([values.new_zeros(1), values.cumsum(0)])) / total
    needed = int((share < threshold).sum())
    needed = min(needed, size - held.shape[1])
    grown, _ = torch.linalg.qr(torch.cat([held, vectors[:, :needed]], dim=1))
    return grown


def _inputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()
