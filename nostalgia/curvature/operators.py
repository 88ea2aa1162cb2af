"""Hessian and generalised Gauss-Newton matrix of a mean loss, as products with vectors spread over ranks.

    H_b v = grad( grad(loss_sum_b) . v )                       HessianOperator
    G_b v = J_b^T  [d^2 loss_sum_b / d outputs^2]  J_b v       GGNOperator, J_b the outputs' Jacobian

(Pearlmutter 1994; Schraudolph 2002). `base` sums them over batches and ranks, `network` says how the model is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.base import BatchedOperator, Parameters, differentiate
from nostalgia.curvature.finite_difference import CentralDifferences
from nostalgia.curvature.losses import OutputLoss, output_loss
from nostalgia.curvature.network import Network, Values
from nostalgia.curvature.sharded import ShardedGradient
from nostalgia.parallel.modules import is_sharded

__all__ = ["BatchedOperator", "GGNOperator", "HessianOperator"]


class HessianOperator(BatchedOperator):
    """Hessian of the mean loss.

    ``loss_fn(model, batch) -> (loss_sum, num_samples)``: the loss summed over a batch's samples, and their number.
    ``batches`` is this rank's share, re-iterable in the same order, possibly empty. ``parameters`` (mapping or
    iterable of the model's own, default all that require a gradient) are the variables; all others are constants.
    ``model`` may be bare, under DDP, sharded by FSDP2, or prepared by Accelerate; it is seen in evaluation mode and
    is not touched.

    ``method``: ``exact`` differentiates the gradient's graph once more, a graph kept for as many batches as memory
    allows (``retain_graph``: ``auto``, True, False; `retained` says how many); ``jvp`` is forward over reverse,
    with ``compile`` by torch.compile; ``finite_difference`` takes central differences of two gradients, checks
    itself (`estimated_error`), and under FSDP2 runs the sharded model itself, without gathering parameters.
    ``precision`` of the network in a product: ``float32``, ``float64``, ``tf32``, ``bf16``.

    Raises UsageError for parameters that are not the model's, a curvature set empty on all ranks, or a model
    that changed since the operator took its parameters (call `refresh`); RunFailedError for what is not finite.

    The Hessian of half a squared error is the matrix of second moments of the inputs:

    Examples:
        >>> import torch
        >>> model, inputs = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> hessian = HessianOperator(model, lambda m, x: (m(x).square().sum() / 2, len(x)), [inputs])
        >>> hessian.matvec(torch.tensor([1.0, 0.0])), inputs.T @ inputs / 2
        (tensor([5., 1.]), tensor([[5., 1.],
                [1., 2.]]))
    """

    METHODS: ClassVar[tuple[str, ...]] = ("exact", "jvp", "finite_difference")

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, int]],
        batches: Iterable[Any],
        parameters: Parameters = None,
        accelerator: Accelerator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, batches, parameters, accelerator, **options)

    @property
    def estimated_error(self) -> float | None:
        """Of a product by finite differences, relative; None before the first and for other methods."""
        return None if self._differences is None else self._differences.estimated_error

    @torch.no_grad()
    def matvec(self, v: Tensor) -> Tensor:
        if self._differences is None:
            return super().matvec(v)
        self._checked(v)
        self.products += 1
        return self._differences.product(v, self._difference)

    @torch.no_grad()
    def gradient(self) -> Tensor:
        if self._sharded is None:
            return super().gradient()
        return self._sharded.summed_at(None) / self._checked()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _take_values(self) -> None:
        self._sharded: ShardedGradient | None = None
        self._differences: CentralDifferences | None = None
        if self.method == "finite_difference":
            values = self.space.take(p.detach() for p in self.parameters.values())
            self._differences = CentralDifferences(self.space, float(self.space.norm(values)))
        if self.method == "finite_difference" and is_sharded(self.model):
            self._sharded = ShardedGradient(
                self.model, self.function, self.batches, self.parameters, self.space, self.precision
            )
        else:
            super()._take_values()

    def _is_current(self) -> bool:
        return self._sharded is not None or super()._is_current()

    def _measure(self) -> tuple[float, int]:
        return self._sharded.measure() if self._sharded is not None else super()._measure()

    def _loss(self, theta: Values, batch: Any) -> tuple[Tensor, int]:
        return self._network(theta, batch)

    def _product(self, index: int, batch: Any, tangents: Values) -> Sequence[Tensor]:
        if self.method == "jvp":
            product = self._maybe_compiled(lambda: _forward_over_reverse(self._network))
            theta = tuple(t.detach() for t in self._network.theta)
            return product(theta, tangents, self._batch(batch))
        theta = self._network.theta
        gradients, kept = self._graphs.get(index, lambda: self._gradient(batch, theta, create_graph=True))
        return differentiate(gradients, theta, tangents, retain_graph=kept)

    def _difference(self, v: Tensor, step: float) -> Tensor:
        """( g(theta + step u) - g(theta - step u) ) |v| / (2 step), u = v / |v|: this rank's part (P_local,)."""
        samples = self.num_samples
        if self._sharded is not None:
            length = float(self.space.norm(v))
            move = v * (step / length) if length else v
            change = self._sharded.summed_at(move) - self._sharded.summed_at(-move)
            return change * (length / (2 * step * samples))
        tangents = self._tangents(v)
        length = float(torch.stack(torch._foreach_norm(tangents)).double().norm())
        moves = torch._foreach_mul(tangents, step / length if length else 0.0)
        ahead, behind = (
            tuple(t.requires_grad_() for t in torch._foreach_add(self._network.theta, moves, alpha=sign))
            for sign in (1, -1)
        )

        def change_of(index: int, batch: Any) -> Sequence[Tensor]:
            change = torch._foreach_sub(self._gradient(batch, ahead), self._gradient(batch, behind))
            return torch._foreach_mul(change, length / (2 * step))

        return self._mean(change_of, samples)


class GGNOperator(BatchedOperator):
    """Generalised Gauss-Newton matrix of the mean loss: positive semi-definite, without the network's curvature.

    ``forward_fn(model, batch) -> (logits, targets)``, logits (B, C). ``loss``: ``cross_entropy`` (targets as for
    `torch.nn.functional.cross_entropy`; rows of target -100 do not count) or ``mse`` (squared error summed over
    outputs). ``label_smoothing`` is training's: it changes the loss and its gradient, not G. ``method``: ``exact``
    takes both factors from one graph, kept as `HessianOperator` keeps its own; ``jvp`` is forward then reverse mode,
    with ``compile`` by torch.compile. The rest as for `HessianOperator`.

    At equal probabilities of two classes the output metric is 1/4 [[1, -1], [-1, 1]]:

    Examples:
        >>> import torch
        >>> model, inputs = torch.nn.Linear(1, 2, bias=False), torch.tensor([[2.0]])
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> ggn = GGNOperator(model, lambda m, b: (m(b[0]), b[1]), [(inputs, torch.tensor([0]))])
        >>> ggn.matvec(torch.tensor([1.0, 0.0]))
        tensor([ 1., -1.])
    """

    def __init__(
        self,
        model: nn.Module,
        forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
        batches: Iterable[Any],
        parameters: Parameters = None,
        accelerator: Accelerator | None = None,
        loss: str = "cross_entropy",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        self.output_loss = output_loss(loss, label_smoothing)
        super().__init__(model, forward_fn, batches, parameters, accelerator, **options)

    def _loss(self, theta: Values, batch: Any) -> tuple[Tensor, int]:
        return self.output_loss.total(*self._network(theta, batch))

    def _product(self, index: int, batch: Any, tangents: Values) -> Sequence[Tensor]:
        if self.method == "jvp":
            product = self._maybe_compiled(lambda: _forward_then_reverse(self._network, self.output_loss))
            theta = tuple(t.detach() for t in self._network.theta)
            return product(theta, tangents, self._batch(batch))
        theta = self._network.theta
        graph, kept = self._graphs.get(index, lambda: self._linearise(batch))
        outputs, targets, cotangent, pulled = graph
        # J v is the derivative of (J^T u) . v in u: one backward through the pull-back's own graph.
        (pushed,) = differentiate(pulled, (cotangent,), tangents, retain_graph=True)
        curved = self.output_loss.curvature(outputs.detach(), targets, pushed)
        return differentiate((outputs,), theta, (curved,), retain_graph=kept)

    @torch.enable_grad()
    def _linearise(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Values]:
        """Outputs, targets, a cotangent u = 0, and J^T u as a function of u."""
        theta = self._network.theta
        outputs, targets = self._network(theta, self._batch(batch))
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        if not outputs.requires_grad:
            return outputs, targets, cotangent, tuple(torch.zeros_like(t) for t in theta)
        pulled = torch.autograd.grad(
            outputs, theta, cotangent, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return outputs, targets, cotangent, pulled


# Functions of the network alone: a compiled function that held the operator would keep its memory in a cycle.


def _forward_over_reverse(network: Network) -> Callable[[Values, Values, Any], Values]:
    def product(theta: Values, tangents: Values, batch: Any) -> Values:
        def loss(values: Values) -> Tensor:
            return network(values, batch)[0]

        return torch.func.jvp(torch.func.grad(loss), (theta,), (tangents,))[1]

    return product


def _forward_then_reverse(network: Network, loss: OutputLoss) -> Callable[[Values, Values, Any], Values]:
    def product(theta: Values, tangents: Values, batch: Any) -> Values:
        def outputs_of(values: Values) -> tuple[Tensor, Tensor]:
            return network(values, batch)

        outputs, pull, targets = torch.func.vjp(outputs_of, theta, has_aux=True)  # type: ignore[misc]
        pushed = torch.func.jvp(outputs_of, (theta,), (tangents,), has_aux=True)[1]
        curved = loss.curvature(outputs, targets, pushed)
        return pull(curved.to(outputs.dtype))[0]

    return product
