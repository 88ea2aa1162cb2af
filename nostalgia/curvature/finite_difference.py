"""Hessian products by central differences of two gradients, for models too large to gather.

    H v ~ |v| ( g(theta + h u) - g(theta - h u) ) / (2 h),   u = v / |v|

The error is of order h^2 from the third derivative and eps / h from rounding. The step is chosen once, from a few in
proportion to |theta|, as the one whose product changes least when it is halved; if even that one changes by more than
`TOLERANCE`, the products are noise and the run fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nostalgia.curvature.context import product_context
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.vector_space import VectorSpace

TOLERANCE = 0.05  # relative change of a product on halving the step
STEPS = {torch.float32: (1e-2, 1e-3, 1e-4), torch.float64: (1e-4, 1e-5, 1e-6)}  # of |theta|

Gradient = Callable[[Tensor], Tensor]


def central_difference(gradient: Gradient, v: Tensor, space: VectorSpace, step: float) -> Tensor:
    """H v (P_local,) with a displacement of length ``step``."""
    length = float(space.norm(v))
    if length == 0.0:
        return torch.zeros_like(v)
    move = v * (step / length)
    return (gradient(move) - gradient(-move)) * (length / (2 * step))


def choose_step(gradient: Gradient, v: Tensor, space: VectorSpace, parameter_norm: float) -> tuple[float, float]:
    """The step and its estimated relative error; raises RunFailedError where no step gives better than noise."""
    scale = parameter_norm or 1.0
    best = (0.0, float("inf"))
    for relative in STEPS[space.dtype]:
        step = relative * scale
        whole = central_difference(gradient, v, space, step)
        half = central_difference(gradient, v, space, step / 2)
        size, change = float(space.norm(half)), float(space.norm(whole - half))
        error = change / size if size > 0 else 0.0 if change == 0 else float("inf")
        if error < best[1]:
            best = (step, error)
    if not best[1] <= TOLERANCE:
        raise RunFailedError(
            f"finite-difference curvature is noise: the best of {len(STEPS[space.dtype])} steps changes a product by "
            f"{best[1]:.0%} when halved (allowed {TOLERANCE:.0%}); use nostalgia.hvp=exact, or "
            "nostalgia.precision=float32 with train.precision=32"
        )
    return best


class ShardedGradient:
    """Mean gradients of an FSDP2 model at displaced parameters, without gathering it.

    Every rank must run the same forward passes, so shorter shares are filled up with batches of weight zero.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, int]],
        batches: Iterable[Any],
        parameters: list[nn.Parameter],
        space: VectorSpace,
        move: Callable[[Any], Any],
        precision: str,
    ) -> None:
        if precision == "float64" and space.dtype != parameters[0].dtype:
            raise UsageError(
                "nostalgia.precision=float64 with nostalgia.hvp=finite_difference under FSDP2: the sharded model "
                "computes in its own precision; use nostalgia.hvp=exact"
            )
        self.model, self.loss_fn, self.batches, self.parameters = model, loss_fn, batches, parameters
        self.space, self.move, self.precision = space, move, precision
        self.num_samples: int | None = None

    def at(self, displacement: Tensor | None) -> Tensor:
        """Mean gradient (P_local,) at the parameters plus ``displacement`` (P_local,)."""
        with self._displaced(displacement):
            self._accumulate(backward=True)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            # FSDP2 averages over ranks; the sum over all samples is wanted.
            return self.space.take(gradients) * (self.space.world_size / float(self.num_samples or 1))

    def loss(self) -> float:
        with self._displaced(None):
            return self._accumulate(backward=False)

    def _accumulate(self, backward: bool) -> float:
        """Run this rank's batches, filled up to the longest share; returns the mean loss over all samples."""
        batches = list(self.batches)
        longest, example = _longest_share(batches, self.space)
        sums = torch.zeros(2, dtype=torch.float64, device=self.space.device)
        with product_context(self.precision, self.space.device), torch.set_grad_enabled(backward):
            for i in range(longest):
                real = i < len(batches)
                loss, samples = self.loss_fn(self.model, self.move(batches[i] if real else example))
                if backward:
                    (loss if real else loss * 0.0).backward()
                if real:
                    sums += torch.tensor([float(loss), float(samples)], dtype=torch.float64, device=sums.device)
        total, samples = self.space.all_reduce(sums).tolist()
        if samples == 0:
            raise UsageError("the curvature set is empty on every rank; give nostalgia.num_samples >= 1")
        self.num_samples = int(samples)
        return total / samples

    @contextmanager
    def _displaced(self, displacement: Tensor | None):
        """Parameters moved, evaluation mode, gradients set aside; everything put back bit for bit."""
        own = list(self.model.parameters())
        gradients = [p.grad for p in own]
        modes = [(module, module.training) for module in self.model.modules()]
        saved = self.space.take(self.parameters)
        for p in own:
            p.grad = None
        self.model.eval()
        try:
            if displacement is not None:
                self.space.put(saved + displacement, self.parameters)
            yield
        finally:
            self.space.put(saved, self.parameters)
            for module, mode in modes:
                module.training = mode
            for p, gradient in zip(own, gradients, strict=True):
                p.grad = gradient
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def _longest_share(batches: list[Any], space: VectorSpace) -> tuple[int, Any]:
    """The largest number of batches on a rank, and a batch to fill up with (another rank's where this one has none)."""
    if space.world_size == 1:
        return len(batches), None
    counts: list[int] = [0] * space.world_size
    dist.all_gather_object(counts, len(batches), group=space.group)
    if max(counts) == 0:
        return 0, None
    example = batches[-1] if batches else None
    if min(counts) == 0:
        source = counts.index(max(counts))
        shared = [example if space.rank == source else None]
        dist.broadcast_object_list(shared, group_src=source, group=space.group)
        example = batches[-1] if batches else shared[0]
    return max(counts), example
