"""At which order the expansion of a finished task's loss fails: measured increase against exact terms, along the way there.

python -m nostalgia.train method=bench.orders:Orders ... model.lora.merge=never     any run on one process

Training is `kronecker`'s, by its own options (method.strength=0: plain fine-tuning). After each later task every finished
task's loss is measured at fractions t of the way the parameters have gone since its end, and written (method.out) beside the
terms of its expansion there: g.d, 1/2 d.Hd with the Hessian, 1/2 d.Gd with the Gauss-Newton matrix, the same of its blocks
by layer alone, and of the Kronecker factors; all over the same samples, at temperature 1, and for t = 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.base import BatchedOperator
from nostalgia.curvature.eigenspace import task_operator
from nostalgia.curvature.kronecker import KroneckerFactors, kronecker_factors
from nostalgia.methods.base import TaskContext
from nostalgia.methods.kronecker import Kronecker, KroneckerConfig
from nostalgia.models.heads import copy_head, head_with
from nostalgia.models.task_model import TaskModel
from nostalgia.options import option

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class OrdersConfig(KroneckerConfig):
    out: str = option("orders.json", "File to write.")


@dataclass
class Finished:
    """A task as it ended; ``position`` and ``gradient`` are vectors (P,) over the parameters in scope."""

    name: str
    head: dict[str, Tensor]
    batches: list[Any]
    position: Tensor
    loss: float
    gradient: Tensor
    factors: KroneckerFactors


class Orders(Kronecker):
    """`kronecker`, which also measures what each order of the expansion explains; not resumable, one process."""

    name = "orders"
    Config = OrdersConfig

    def __init__(self, config: OrdersConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.finished: list[Finished] = []
        self.rows: list[dict[str, Any]] = []

    def end_task(self, task: TaskContext) -> None:
        super().end_task(task)
        for earlier in self.finished:
            self.rows.append({"task": earlier.name, "after": task.tasks[-1].name, **orders(task, earlier)})
            Path(self.config.out).write_text(json.dumps(self.rows, indent=1) + "\n")
        if task.index < task.num_tasks:
            self.finished.append(finished(task))


def operator(task: TaskContext, head: dict[str, Tensor], batches: Sequence[Any], kind: str) -> BatchedOperator:
    """The curvature of the loss under ``head`` at the network's present parameters."""
    model = TaskModel(task.model.backbone, [head_with(head)])  # type: ignore[arg-type]
    options = dataclasses.replace(task.curvature, kind=kind, hvp="exact")
    return task_operator(model, task.objective, batches, task.parameters, task.accelerator, options, task.space)


def finished(task: TaskContext) -> Finished:
    batches = task.samples(task.curvature.num_samples)
    for batch in batches:
        batch.tasks = torch.zeros_like(batch.tasks)
    head = copy_head(task.model.heads[task.head])  # type: ignore[index,arg-type]
    hessian = operator(task, head, batches, "hessian")
    factors = kronecker_factors(
        hessian.model,
        task.objective.forward_fn,
        batches,
        task.parameters,
        task.accelerator,
        draws=16,
        seed=task.seed,
        space=task.space,
    )
    position = task.space.take(p.detach().clone() for p in task.parameters.values())
    return Finished(task.tasks[-1].name, head, batches, position, hessian.loss(), hessian.gradient(), factors)


def orders(task: TaskContext, earlier: Finished) -> dict[str, Any]:
    """Terms of the expansion (for t = 1) and the measured increase at each fraction of the way."""
    space = task.space
    here = space.take(p.detach().clone() for p in task.parameters.values())
    d = here - earlier.position
    with at(task, earlier.position):
        forms = {
            kind: 0.5 * float(d.double() @ operator(task, earlier.head, earlier.batches, kind).matvec(d).double())
            for kind in ("hessian", "ggn")
        }
        ggn = operator(task, earlier.head, earlier.batches, "ggn")
        blocks = sum(0.5 * float(part.double() @ ggn.matvec(part).double()) for part in by_layer(task, d))
    whole = [dict(zip(space.names, space.gather(v), strict=True)) for v in (earlier.position, here)]
    measured = []
    for fraction in FRACTIONS:
        with at(task, earlier.position + fraction * d):
            measured.append(operator(task, earlier.head, earlier.batches, "hessian").loss() - earlier.loss)
    return {
        "linear": float(earlier.gradient.double() @ d.double()),
        **forms,
        "blocks": blocks,
        "kronecker": earlier.factors.increase(*whole),
        "fractions": FRACTIONS,
        "measured": measured,
    }


def by_layer(task: TaskContext, d: Tensor) -> Iterator[Tensor]:
    """The part of ``d`` (P,) in each layer: in an adapter's A and B together."""
    whole = dict(zip(task.space.names, task.space.gather(d), strict=True))
    layer = {name: name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".bias") for name in whole}
    for one in dict.fromkeys(layer.values()):
        yield task.space.take(v if layer[name] == one else torch.zeros_like(v) for name, v in whole.items())


@contextmanager
def at(task: TaskContext, position: Tensor) -> Iterator[None]:
    """The network at ``position`` (P,), and back."""
    parameters = list(task.parameters.values())
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, task.space.gather(position), strict=True):
            p.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
