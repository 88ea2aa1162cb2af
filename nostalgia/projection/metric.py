"""The diagonal metric D in which an optimizer takes its steps: d0 = -lr D^-1 m, m its momentum.

A constrained step is corrected in this metric. An optimizer that is not listed is refused: a correction in a metric of
another optimizer keeps Q d = 0, but is not the nearest step to the optimizer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace

# The inverse of the metric (P_local,) at ``parameters``, or None where the metric is the identity.
Metric = Callable[[Optimizer, Sequence[nn.Parameter], VectorSpace], Tensor | None]
METRIC_FLOOR = 0.1  # of the metric's root mean square: see `_inverse`


def metric_of(optimizer: Optimizer) -> Metric:
    """The metric of ``optimizer``, which may be wrapped by Accelerate.

    A class of your own declares it as ``diagonal_metric``, a static method such as `identity`. Raises UsageError for one
    whose metric is not known.
    """
    bare = bare_optimizer(optimizer)
    metric = getattr(bare, "diagonal_metric", None) or METRICS.get(type(bare))
    if metric is None:
        raise UsageError(
            f"a constrained step needs the optimizer's metric, and that of {type(bare).__name__} is not known; known are "
            f"{', '.join(kind.__name__ for kind in METRICS)} and classes with a `diagonal_metric`: use one of these, or "
            "project=displacement"
        )
    return metric


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer within Accelerate's wrapper, if there is one."""
    return getattr(optimizer, "optimizer", optimizer)


def identity(optimizer: Optimizer, parameters: Sequence[nn.Parameter], space: VectorSpace) -> None:
    """All coordinates are scaled alike."""


def adam(optimizer: Optimizer, parameters: Sequence[nn.Parameter], space: VectorSpace) -> Tensor:
    """D = sqrt(v_hat) + eps, with v_hat the second moment without its bias."""
    groups, state = _groups(optimizer), optimizer.state
    key = "max_exp_avg_sq" if any(group.get("amsgrad") for group in groups.values()) else "exp_avg_sq"
    metric = space.take([_moment(state[p], key, p) for p in parameters])
    unbiased = [1.0 - groups[p]["betas"][1] ** float(state[p].get("step", 1)) for p in parameters]
    metric.div_(_spread(unbiased, parameters, space)).sqrt_()
    return _inverse(metric.add_(_spread([groups[p]["eps"] for p in parameters], parameters, space)), space)


def rmsprop(optimizer: Optimizer, parameters: Sequence[nn.Parameter], space: VectorSpace) -> Tensor:
    """D = sqrt(v) + eps, of the second moment about zero (also where ``centered``)."""
    groups, state = _groups(optimizer), optimizer.state
    metric = space.take([_moment(state[p], "square_avg", p) for p in parameters]).sqrt_()
    return _inverse(metric.add_(_spread([groups[p]["eps"] for p in parameters], parameters, space)), space)


METRICS: dict[type[Optimizer], Metric] = {
    AdamW: adam,
    Adam: adam,
    NAdam: adam,
    RAdam: adam,
    RMSprop: rmsprop,
    SGD: identity,
}


def _groups(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def _moment(state: dict[str, Any], key: str, parameter: nn.Parameter) -> Tensor:
    """A parameter that has had no gradient yet has no moment: zero."""
    return state[key] if key in state else torch.zeros_like(parameter)


def _inverse(metric: Tensor, space: VectorSpace) -> Tensor:
    """1 / D, with D floored at a tenth of its root mean square; ``metric`` is overwritten.

    Any positive D keeps Q d = 0, and without the floor coordinates whose second moment is near zero would take most of
    the correction.
    """
    root_mean_square = space.norm(metric) / space.size**0.5
    return metric.clamp_min_(METRIC_FLOOR * float(root_mean_square)).reciprocal_()


def _spread(numbers: Sequence[float], parameters: Sequence[nn.Parameter], space: VectorSpace) -> float | Tensor:
    """A number a parameter: one where all agree, else spread to (P_local,)."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return space.take([torch.full_like(p, number) for p, number in zip(parameters, numbers, strict=True)])
