"""Path step: when a task ends, how much of the way from its start is kept, with its head fitted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.data.stream import Batch
from nostalgia.errors import UsageError
from nostalgia.linalg.block import Block
from nostalgia.methods.base import TaskContext
from nostalgia.methods.tail import Tail
from nostalgia.methods.vectors import training_space
from nostalgia.models import norm_statistics
from nostalgia.models.backbone import Backbone

SHARES = tuple(tenths / 10 for tenths in range(10, 0, -1))
PRIOR = 1.0  # of a refitted head: as scikit-learn's LogisticRegression with C = 1, around the head as it was trained
PATH_HELP = (
    "Share of the way from its start that is kept when a task ends, with its head fitted again; 1: all of it; auto: the tenth "
    "with the least sum of the predicted increase of earlier tasks' losses and the task's own loss."
)


class PathStep:
    """theta <- theta_start + share (theta_end - theta_start) of the parameters in scope, from the second task on.

    ``auto`` takes the share of `SHARES` that minimises predicted(theta) + own(theta): the first is the tail's form, earlier
    tasks' predicted increase of loss, the second the task's mean loss over samples of it, under its head fitted to them at
    theta. The new head alone is fitted, and not where tasks share one; batch-norm statistics are taken anew from the samples.
    """

    def __init__(self, path: float | str) -> None:
        if isinstance(path, str) and path != "auto":
            raise UsageError(f"method.path={path}: allowed are auto and a number more than 0, up to 1")
        self.path = path
        self.start: Block | None = None  # the one row is theta_start; None where nothing is to be done
        self.share: float | None = None  # of the task that has just ended; None: not taken yet
        self.note = ""

    def begin(self, task: TaskContext) -> None:
        """Note where the task starts."""
        self.start, self.share, self.note = None, None, ""
        if self.path != 1 and task.index > 1:
            space = training_space(task)
            self.start = Block(space.take(p.detach() for p in task.parameters.values())[None], space)

    @torch.no_grad()
    def end(self, task: TaskContext, num_samples: int, tail: Tail) -> None:
        """Shorten the way: once, also where a run resumes after it. ``auto`` needs a tail. A collective."""
        if self.start is None or self.share is not None:
            return
        parameters = list(task.parameters.values())
        start, end = self.start.to(task.space)[0], task.space.take(p.detach() for p in parameters)
        batches = task.samples(num_samples)
        head = None if any(earlier.head == task.tasks[-1].head for earlier in task.tasks[:-1]) else _head(task)
        backbone = cast(Backbone, _module(task.model, "backbone"))

        def at(share: float) -> Fit:
            task.space.put(end if share == 1 else start + share * (end - start), parameters)
            # What training has left is of other weights; at the end too, so that shares are compared alike.
            norm_statistics.measure_anew(backbone, (batch.images for batch in batches))
            return fit_head(task, batches, head)

        if isinstance(self.path, float):
            share, fit = self.path, at(self.path)
        else:
            share, fit = 1.0, at(1.0)
            least = fit.loss + float(tail.increase(task))
            for shorter in SHARES[1:]:
                other = at(shorter)
                total = other.loss + float(tail.increase(task))
                if total < least:
                    least, share, fit = total, shorter, other
            at(share)
        if head is not None:
            head.weight.copy_(fit.weight)
            head.bias.copy_(fit.bias)
        self.share, self.start = share, None
        self.note = f"{share:.0%} of its way is kept"

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "share": self.share}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start, self.share = state["start"], state["share"]


class Fit:
    """A head (C, D), (C,) and its mean loss."""

    def __init__(self, weight: Tensor, bias: Tensor, loss: float) -> None:
        self.weight, self.bias, self.loss = weight, bias, loss


def fit_head(task: TaskContext, batches: Sequence[Batch], head: nn.Linear | None) -> Fit:
    """The head of least summed loss + `PRIOR` / 2 |change|^2 over the samples of all ranks, by L-BFGS in float64.

    Without ``head`` that of the task as it is. The network is not changed. A collective.
    """
    trained = _head(task)
    old = torch.cat([trained.weight.double(), trained.bias.double()[:, None]], dim=1)  # (C, D + 1)
    features, labels = _features(task, batches)
    count = task.space.all_reduce(torch.tensor([len(labels)], dtype=torch.float64, device=old.device))

    def loss(matrix: Tensor) -> Tensor:
        logits = features @ matrix.T
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=task.objective.label_smoothing)

    new = old.clone()
    if head is not None:
        new.requires_grad_(True)
        optimizer = torch.optim.LBFGS([new], max_iter=100, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            with torch.enable_grad():
                own = loss(new)
                (gradient,) = torch.autograd.grad(own, [new])
            whole = task.space.all_reduce(torch.cat([own.detach()[None], gradient.flatten()]))
            change = new.detach() - old
            new.grad = whole[1:].view_as(new) + PRIOR * change
            return whole[0] + PRIOR / 2 * change.square().sum()

        optimizer.step(closure)
        new = new.detach()
    mean = task.space.all_reduce(loss(new)[None]) / count
    return Fit(new[:, :-1], new[:, -1], float(mean))


def _features(task: TaskContext, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Of this rank's samples, in evaluation mode: (n, D + 1) float64 with a column of ones for the bias, and labels (n,)."""
    backbone, head = _module(task.model, "backbone"), _head(task)
    was_training = backbone.training
    backbone.eval()
    try:
        with task.accelerator.autocast():
            rows = [backbone(batch.images).double() for batch in batches]
    finally:
        backbone.train(was_training)
    empty = head.weight.new_zeros(0, head.in_features, dtype=torch.float64)
    features = torch.cat([empty, *rows])
    labels = torch.cat([torch.zeros(0, dtype=torch.long, device=features.device), *(b.labels for b in batches)])
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1), labels


def _head(task: TaskContext) -> nn.Linear:
    heads = _module(task.model, "heads")
    assert isinstance(heads, nn.ModuleList)
    head = heads[task.head]
    assert isinstance(head, nn.Linear)
    return head


def _module(model: nn.Module, name: str) -> nn.Module:
    found = getattr(model, name)
    assert isinstance(found, nn.Module)
    return found


def check_path(path: float | str, tail: Tail) -> None:
    """Raise UsageError for method.path=auto without a tail, which predicts what a length costs earlier tasks."""
    if path == "auto" and type(tail) is Tail:
        raise UsageError(
            "method.path=auto weighs the predicted increase of earlier tasks' losses, and without a tail nothing predicts it: "
            "give the penalty a strength above 0 (method=nostalgia: method.tail=kronecker), or method.path a number up to 1"
        )
