"""A hand-made run for methods: a small network in float64, two tasks of four-number images, and one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.data.exemplars import Exemplar, ExemplarLoader
from nostalgia.data.images import ArrayImages
from nostalgia.data.prepared import Prepared, View
from nostalgia.data.resizing import Resizing
from nostalgia.data.stream import Batch, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods import Method, Objective, TaskContext
from nostalgia.models.task_model import TaskModel

CLASSES, SIDE = 3, 2
VIEW = View(Resizing(SIDE), (0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float64)


class Features(nn.Module):
    """Two layers on flattened images (B, 3, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(images.flatten(1)))))


def make_task(index: int, samples: int = 12) -> Task:
    generator = np.random.default_rng(index)
    pixels = generator.integers(0, 255, (samples, SIDE, SIDE, 3), dtype=np.uint8)
    images = ArrayImages(f"set{index}", pixels, [i % CLASSES for i in range(samples)], ["a", "b", "c"])
    name = f"task{index}_set{index}"
    return Task(index, name, f"set{index}", ("a", "b", "c"), images, images, (), "none", "made", name)


class Sequence2:
    """Two tasks; `begin`, `step`, `end` drive a method as a run does."""

    def __init__(self, make: Callable[[], nn.Module] = Features) -> None:
        self.backbone = make().double()
        self.tasks = [make_task(1), make_task(2)]
        self.heads = [self._head(i) for i in range(2)]
        scope = dict(self.backbone.named_parameters())
        self.space = VectorSpace.of(scope)
        self.accelerator = Accelerator(cpu=True)
        self.model: TaskModel = None  # type: ignore[assignment]
        self.passes = 1.0

    def context(self, method: Method, index: int) -> TaskContext:
        chosen = self.heads[:index] if method.all_heads else [self.heads[index - 1]]
        for head in chosen[:-1]:
            head.requires_grad_(method.trains_heads)
        self.model = TaskModel(self.backbone, chosen)
        head = len(chosen) - 1

        def samples(count: int, batch_size: int | None = None) -> list[Batch]:
            images = Prepared([self.tasks[index - 1].train], [()], Resizing(SIDE))
            batches = curvature_batches(
                images, VIEW, name="x", num_samples=count, batch_size=batch_size or 5, seed=0, rank=0, world_size=1
            )
            for batch in batches:
                batch.tasks, batch.head = torch.full_like(batch.tasks, head), head
            return batches

        def loader(exemplars: Sequence[Exemplar]) -> ExemplarLoader:
            images = Prepared([t.train for t in self.tasks[:index]], [()] * index, Resizing(SIDE))
            return ExemplarLoader(exemplars, images, VIEW, augment=["none"] * index, heads=list(range(index)), seed=0)

        return TaskContext(
            index=index,
            tasks=self.tasks[:index],
            num_tasks=2,
            model=self.model,
            parameters=dict(self.backbone.named_parameters()),
            space=self.space,
            objective=Objective(),
            accelerator=self.accelerator,
            curvature=CurvatureOptions(num_samples=12, batch_size=5, tol=1e-6, last_task=True),
            seed=0,
            head=head,
            image_bytes=3 * SIDE**2,
            samples=samples,
            loader=loader,
            every_image=lambda: iter(samples(12)),
            passes=self.passes,
        )

    def begin(self, method: Method, index: int) -> TaskContext:
        context = self.context(method, index)
        method.task = context
        method.begin_task(context)
        return context

    def gradients(self, method: Method) -> dict[str, Tensor]:
        """What the optimizer would see of one step over the whole task, by parameter of the backbone."""
        batch = self.batch(method)
        self.model.zero_grad()
        output = method.loss(self.model, batch)
        (output.loss / len(batch)).backward()
        method.gradients()
        return {name: p.grad.clone() for name, p in self.backbone.named_parameters() if p.grad is not None}

    def batch(self, method: Method) -> Batch:
        (batch,) = method.task.samples(12, 12)
        batch.epoch = 1
        return batch

    def steps(self, method: Method, count: int = 3) -> None:
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(count):
            self.gradients(method)
            method.step(optimizer)

    def first_task(self, method: Method) -> TaskContext:
        context = self.begin(method, 1)
        self.steps(method)
        method.end_task(context)
        return context

    def plain_gradients(self, extra: Callable[[dict[str, Tensor]], Any] | None = None) -> dict[str, Tensor]:
        """Of the present task's mean loss plus ``extra(parameters)``, by autograd alone."""
        parameters = dict(self.backbone.named_parameters())
        images = Prepared([self.tasks[1].train], [()], Resizing(SIDE))
        (batch,) = curvature_batches(
            images, VIEW, name="x", num_samples=12, batch_size=12, seed=0, rank=0, world_size=1
        )
        logits = self.heads[1](self.backbone(batch.images))
        total = nn.functional.cross_entropy(logits, batch.labels)
        if extra is not None:
            total = total + extra(parameters)
        found = torch.autograd.grad(total, list(parameters.values()))
        return dict(zip(parameters, found, strict=True))

    @staticmethod
    def _head(index: int) -> nn.Linear:
        torch.manual_seed(10 + index)
        return nn.Linear(4, CLASSES).double()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10)
