"""The path step: what of a task's way is kept, the head fitted to it, and that it is taken once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from nostalgia.errors import UsageError
from nostalgia.methods import Method
from nostalgia.methods.loading import make_method
from tests.unit.methods.context import CLASSES, Features, Sequence2


class Normalised(Features):
    """With a batch norm between its layers."""

    norm_frozen = False

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.norm(self.first(images.flatten(1))))))


def trained(
    make: Callable[[], nn.Module] = Features, **options: object
) -> tuple[Sequence2, Method, dict[str, Tensor], dict[str, Tensor]]:
    """Two tasks of a method, before the second ends; the parameters at its start and as it was trained."""
    run, method = Sequence2(make), make_method("kronecker", {"num_samples": 12, **options}, 0)
    run.first_task(method)
    start = {name: p.detach().clone() for name, p in run.backbone.named_parameters()}
    run.begin(method, 2)
    run.steps(method, 20)
    return run, method, start, {name: p.detach().clone() for name, p in run.backbone.named_parameters()}


def own_loss(run: Sequence2, method: Method, *, fit: bool) -> float:
    """Mean loss of the second task at the backbone as it stands; ``fit``: under the head of least loss + |change|^2 / 2."""
    batch = run.batch(method)
    head = run.heads[1]
    with torch.no_grad():
        features = run.backbone(batch.images)
    trained = torch.cat([head.weight.detach(), head.bias.detach()[:, None]], dim=1)

    def logits(matrix: Tensor) -> Tensor:
        return features @ matrix[:, :-1].T + matrix[:, -1]

    def fitted(flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = torch.from_numpy(flat).view_as(trained).requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(logits(matrix), batch.labels, reduction="sum")
        loss = loss + (matrix - trained).square().sum() / 2
        return float(loss.detach()), torch.autograd.grad(loss, matrix)[0].numpy().ravel()

    if fit:
        found = minimize(fitted, trained.numpy().ravel(), jac=True, method="BFGS", options={"gtol": 1e-8})
        trained = torch.from_numpy(found.x).view_as(trained)
    return float(torch.nn.functional.cross_entropy(logits(trained), batch.labels))


def test_a_share_of_the_way_is_kept_and_the_head_fits_it() -> None:
    run, method, start, end = trained(path=0.5)
    before = own_loss(run, method, fit=False)
    with torch.no_grad():
        for name, p in run.backbone.named_parameters():
            p.copy_(start[name] + 0.5 * (end[name] - start[name]))
    expected, unfitted = own_loss(run, method, fit=True), own_loss(run, method, fit=False)
    for name, p in run.backbone.named_parameters():
        p.data.copy_(end[name])
    method.end_task(method.task)
    for name, p in run.backbone.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] + 0.5 * (end[name] - start[name]), atol=1e-12, rtol=0)
    assert own_loss(run, method, fit=False) == pytest.approx(expected, abs=1e-6)
    assert before < expected < unfitted
    assert "50% of its way" in method.note()


@pytest.mark.parametrize("strength", [0.01, 30.0])
def test_auto_is_the_least_sum_of_predicted_increase_and_own_loss(strength: float) -> None:
    run, method, start, end = trained(path="auto", strength=strength, temperature=1.0)
    sums = {}
    for share in [tenths / 10 for tenths in range(1, 11)]:
        with torch.no_grad():
            for name, p in run.backbone.named_parameters():
                p.copy_(start[name] + share * (end[name] - start[name]))
        predicted = method.tail.memory.penalty(dict(run.backbone.named_parameters())) / strength  # type: ignore[attr-defined]
        sums[share] = own_loss(run, method, fit=True) + float(predicted.detach())
    for name, p in run.backbone.named_parameters():
        p.data.copy_(end[name])
    method.end_task(method.task)
    best = min(sums, key=sums.__getitem__)
    assert best == (0.8 if strength < 1 else 1.0)
    for name, p in run.backbone.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] + best * (end[name] - start[name]), atol=1e-12, rtol=0)


def test_all_of_the_way_changes_nothing() -> None:
    run, method, _, end = trained(path=1.0)
    head = run.heads[1].weight.detach().clone()
    method.end_task(method.task)
    assert all(torch.equal(p.detach(), end[name]) for name, p in run.backbone.named_parameters())
    assert torch.equal(run.heads[1].weight.detach(), head)
    assert method.state_dict()["path"] == {"start": None, "share": None}


@pytest.mark.parametrize("path", [0.5, "auto"])
def test_batch_norm_normalises_by_the_weights_that_are_kept(path: float | str) -> None:
    run, method, _, _ = trained(Normalised, path=path)
    norm: nn.BatchNorm1d = run.backbone.norm  # type: ignore[assignment]
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    method.end_task(method.task)
    images = [batch.images.flatten(1) for batch in method.task.samples(12)]
    expected = torch.stack([run.backbone.first(x).mean(0) for x in images]).mean(0)  # type: ignore[operator]
    torch.testing.assert_close(norm.running_mean, expected.detach(), atol=1e-12, rtol=0)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_a_run_that_resumes_after_it_does_not_take_it_again() -> None:
    run, method, _, _ = trained(path=0.5)
    method.end_task(method.task)
    after = {name: p.detach().clone() for name, p in run.backbone.named_parameters()}
    state = method.state_dict()
    again = make_method("kronecker", {"num_samples": 12, "path": 0.5}, 0)
    again.load_state_dict(state)
    run.begin(again, 2)
    again.load_state_dict(state)
    again.end_task(again.task)
    assert all(torch.equal(p.detach(), after[name]) for name, p in run.backbone.named_parameters())


def test_a_shared_head_is_not_fitted() -> None:
    run, method, _, _ = trained(path=0.5)
    method.task.tasks = [run.tasks[0], replace(run.tasks[1], head=run.tasks[0].head)]
    head = run.heads[1].weight.detach().clone()
    method.end_task(method.task)
    assert torch.equal(run.heads[1].weight.detach(), head)
    assert head.shape[0] == CLASSES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "half"}, "method.path=half: allowed are auto and a number more than 0, up to 1"),
        ({"path": 0.0}, "method.path=0.0: allowed is more than 0, up to 1"),
        ({"path": 1.5}, "method.path=1.5"),
        ({"path": "auto", "strength": 0.0}, "method.path=auto weighs the predicted increase"),
    ],
)
def test_wrong_paths_are_refused(options: dict[str, object], words: str) -> None:
    run = Sequence2()
    with pytest.raises(UsageError, match=words):
        make_method("kronecker", options, 0).check(2, run.context(make_method("finetune", {}, 0), 1).curvature)
