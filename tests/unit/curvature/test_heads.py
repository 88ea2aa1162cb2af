"""Curvature of a loss over several heads, as joint training and a method with all heads train it, against dense formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.eigenspace import CurvatureOptions, task_operator
from nostalgia.curvature.fisher import diagonal_fisher
from nostalgia.data.images import ArrayImages
from nostalgia.data.prepared import Prepared, View
from nostalgia.data.resizing import Resizing
from nostalgia.data.stream import Batch, curvature_batches
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models.objective import Objective
from nostalgia.models.task_model import TaskModel

VIEW = View(Resizing(2), (0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float64)


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.layer(images.flatten(1)))


def images() -> Prepared:
    """Two tasks of 9 and 5 images, of 3 and of 2 classes."""
    made = []
    for count, classes in ((9, 3), (5, 2)):
        pixels = np.random.default_rng(count).integers(0, 255, (count, 2, 2, 3), dtype=np.uint8)
        names = [str(c) for c in range(classes)]
        made.append(ArrayImages("set", pixels, [i % classes for i in range(count)], names))
    return Prepared(made, [(), ()], Resizing(2))


def batches(count: int = 12, world: int = 1) -> list[list[Batch]]:
    options = {"name": "joint", "num_samples": count, "batch_size": 4, "seed": 0, "world_size": world}
    return [curvature_batches(images(), VIEW, rank=rank, **options) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_curvature_batch_is_of_one_task_and_the_set_the_same_on_any_ranks(world: int) -> None:
    shares = batches(world=world)
    assert all(len(batch.tasks.unique()) == 1 for share in shares for batch in share)
    found = sorted(int(i) for share in shares for batch in share for i in batch.indices)
    assert found == sorted(int(i) for batch in batches()[0] for i in batch.indices)
    assert len(found) == 12


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_the_curvature_is_that_of_the_loss_over_both_heads(kind: str) -> None:
    torch.manual_seed(0)
    model = TaskModel(Features(), [nn.Linear(4, 3), nn.Linear(4, 2)]).double()
    objective, scope = Objective(), dict(model.backbone.named_parameters())
    (own,) = batches()
    accelerator = Accelerator(cpu=True)
    operator = task_operator(
        model,
        objective,
        own,
        scope,
        accelerator,
        CurvatureOptions(kind=kind, precision="float64"),
        VectorSpace.of(scope),
    )
    theta = torch.cat([p.detach().flatten() for p in scope.values()])
    shapes = [p.shape for p in scope.values()]

    def logits(flat: Tensor, batch: Batch) -> Tensor:
        parts = [p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        values = dict(zip((f"backbone.{name}" for name in scope), parts, strict=True))
        return torch.func.functional_call(model, values, (batch.images,))[int(batch.tasks[0])]

    dense = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for batch in own:
        if kind == "hessian":
            dense += torch.func.hessian(
                lambda flat, b=batch: F.cross_entropy(logits(flat, b), b.labels, reduction="sum")
            )(theta)
            continue
        jacobian, probabilities = torch.func.jacrev(logits)(theta, batch), logits(theta, batch).softmax(1)
        for j, p in zip(jacobian, probabilities, strict=True):
            dense += j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    product = torch.stack([operator.matvec(row) for row in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(product, dense / 12, rtol=1e-10, atol=1e-12)


def test_a_batch_of_several_heads_is_refused_where_one_head_is_meant() -> None:
    model = TaskModel(Features(), [nn.Linear(4, 3), nn.Linear(4, 2)]).double()
    (own,) = batches()
    mixed = own[0].followed_by(own[-1])
    scope = dict(model.backbone.named_parameters())
    with pytest.raises(UsageError, match=r"under 2 heads \(0, 1\)"):
        diagonal_fisher(model, Objective().forward_fn, [mixed], scope, VectorSpace.of(scope))
