"""The projection where adapters begin anew after each task: what it holds is what B at zero can change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nostalgia.curvature.eigenspace import gradient_rows, task_operator
from nostalgia.methods import Method
from nostalgia.methods.loading import make_method
from tests.unit.methods.context import CLASSES, Features, Sequence2

HELD = 3  # samples whose curvature is taken: rank 6 of the 18 coordinates of B


class Pair(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.default = nn.Linear(columns, rows, bias=False)


class Adapted(nn.Module):
    """A layer W + B A, named as PEFT names its parts."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(outputs, inputs) / inputs**0.5)
        self.lora_A, self.lora_B = Pair(rank, inputs), Pair(outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.lora_B.default(self.lora_A.default(x))  # type: ignore[operator]

    @torch.no_grad()
    def begin_anew(self) -> None:
        self.weight += self.lora_B.default.weight @ self.lora_A.default.weight  # type: ignore[operator]
        self.lora_B.default.weight.zero_()


class AdaptedFeatures(Features):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Adapted(12, 5), Adapted(5, 4)  # type: ignore[assignment]


class Run(Sequence2):
    """Two tasks with adapters begun anew between them, as a run does it."""

    def __init__(self, solver: str) -> None:
        super().__init__(AdaptedFeatures)
        self.solver = solver

    def context(self, method: Method, index: int):  # type: ignore[no-untyped-def]
        context = super().context(method, index)
        context.begins_anew = True
        kind = "ggn" if self.solver == "rows" else "hessian"
        vars(context.curvature).update(num_samples=HELD, solver=self.solver, kind=kind, rows_per_sample=CLASSES)
        return context

    def outputs(self, task: int) -> Tensor:
        """Of the samples whose curvature was taken, under the first task's head."""
        with torch.no_grad():
            return self.heads[0](self.backbone(self.held)).softmax(dim=1)

    def begin_second(self, method: Method) -> None:
        task = self.first_task(method)
        self.held = torch.cat([batch.images for batch in task.samples(HELD)])
        for layer in (self.backbone.first, self.backbone.second):
            layer.begin_anew()  # type: ignore[operator]
        self.begin(method, 2)


@pytest.mark.parametrize("solver", ["rows", "lanczos"])
def test_it_is_the_top_of_the_curvature_in_b(solver: str) -> None:
    run = Run(solver)
    method = make_method("nostalgia", {"top_k": 4, "tail": "none"}, 0)
    task = run.first_task(method)
    batches, space = task.samples(HELD, task.curvature.batch_size), task.space
    common = (task.model, task.objective, batches, task.parameters, task.accelerator, task.curvature, space)
    if solver == "rows":
        rows = torch.cat(list(gradient_rows(*common)))
        dense = rows.T @ rows / HELD
    else:
        operator = task_operator(*common)
        dense = torch.stack([operator.matvec(e) for e in torch.eye(space.size, dtype=torch.float64)])
    in_b = torch.cat([torch.full((p.numel(),), ".lora_B." in name) for name, p in task.parameters.items()])
    values, vectors = torch.linalg.eigh(dense[in_b][:, in_b])
    pairs = method.eigenpairs()
    assert pairs is not None
    torch.testing.assert_close(pairs.eigenvalues.cpu(), values.flip(0)[:4], atol=1e-8, rtol=1e-6)
    assert not pairs.eigenvectors[:, ~in_b].any()
    overlap = (pairs.eigenvectors[:, in_b] @ vectors.flip(1)[:, :4]).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("project", ["constrained", "displacement"])
def test_a_projected_step_changes_what_is_held_to_second_order_alone(project: str) -> None:
    """All of the samples' Gauss-Newton matrix is held; a step ten times shorter changes their outputs a hundredth."""

    def change(lr: float, *, projected: bool) -> float:
        run = Run("rows")
        options = {"top_k": 18, "tail": "none", "project": project}
        method = make_method("nostalgia" if projected else "finetune", options if projected else {}, 0)
        run.begin_second(method)
        before = run.outputs(1)
        optimizer = torch.optim.AdamW(list(run.backbone.parameters()), lr=lr, weight_decay=0.0)
        for _ in range(2):  # the first leaves A where it is
            run.gradients(method)
            method.step(optimizer)
        return float((run.outputs(1) - before).norm())

    assert change(1e-3, projected=False) / change(1e-4, projected=False) == pytest.approx(10, rel=0.2)
    assert change(1e-3, projected=True) / change(1e-4, projected=True) == pytest.approx(100, rel=0.3)
