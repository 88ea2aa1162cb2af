"""Keeps training steps inside the complement of the memory's subspace.

With Q (m, P) the memory's orthonormal rows, g the synchronised gradient and a the parameters at the start of the task:

* gradient:     g <- g - Q^T (Q g)
* displacement: theta <- theta - Q^T Q (theta - a) after the optimizer's step
* constrained:  theta <- theta - D^-1 Q^T (Q D^-1 Q^T)^-1 Q (theta - a), with D the optimizer's metric

Where theta lay in the complement before the step, as constrained steps leave it, Q (theta - a) is Q d0 of the optimizer's own
step d0, and the last line is the nearest step to d0 in D with Q d = 0. Written with the displacement, rounding does not add
up over steps. D stands still for ``metric_every`` steps.

The products are global: one coefficient a row over all projected parameters and ranks, not one a layer. Rows stored in
bfloat16 are no longer orthonormal; the inverse of their Gram matrix takes the place of the identity then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection.constraint import StepConstraint, solve_gram
from nostalgia.projection.memory import CurvatureMemory
from nostalgia.projection.metric import bare_optimizer, metric_of
from nostalgia.projection.rows import BasisRows


class GradientProjector:
    """Projects gradients and optimizer steps of ``parameters`` away from ``memory``.

    ``parameters`` maps names to the parameters in training (plain or DTensor), in the order and of the shapes the
    memory was computed with. An empty memory projects nothing. The parameters' values at construction are the anchor
    from which displacements are measured. ``metric_every``: constrained steps between two looks at the optimizer's metric.

    Examples:
        >>> import torch
        >>> from nostalgia import CurvatureMemory, HessianOperator, lanczos
        >>> model, inputs = torch.nn.Linear(2, 1, bias=False), torch.tensor([[2.0, 0.0]])
        >>> hessian = HessianOperator(model, lambda m, x: (m(x).square().sum() / 2, len(x)), [inputs])
        >>> memory = CurvatureMemory(k=1)
        >>> _ = memory.update(lanczos(hessian, k=1))
        >>> projector = GradientProjector(memory, dict(model.named_parameters()))
        >>> model.weight.grad = torch.ones(1, 2)
        >>> _ = projector.project_gradients()
        >>> [round(abs(float(g)), 5) for g in model.weight.grad[0]]  # the old task's one direction is out
        [0.0, 1.0]
    """

    def __init__(
        self,
        memory: CurvatureMemory,
        parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter],
        metric_every: int = 10,
    ) -> None:
        self.memory = memory
        if not isinstance(parameters, Mapping):
            parameters = {str(i): p for i, p in enumerate(parameters)}
        self._parameters = list(parameters.values())
        if memory.basis is not None and memory.space is not None:
            memory.check_layout(parameters)
            self._rows = BasisRows(memory.basis, memory.space)
            self._inverse_gram = memory.inverse_gram()  # (m, m) float64, None where rows are orthonormal
            self._constraint = StepConstraint(self._rows, self._inverse_gram, metric_every)
            self._anchor = self._take(self._parameters)[None]  # (1, P_local)

    @property
    def active(self) -> bool:
        return self.memory.basis is not None

    @torch.no_grad()
    def project_gradients(self) -> Tensor | None:
        """Project the gradients in place; call when they are synchronised and unscaled, before clipping.

        Returns the fraction |Q g|^2 / |g|^2 that was removed (0-dim tensor on the device), None without a memory.
        """
        if not self.active:
            return None
        gradients = self._gradients()
        g = self._take(gradients)
        coefficients, norms = self._rows.coefficients(g)
        solved = solve_gram(self._inverse_gram, coefficients)
        self._rows.subtract(g, solved)
        self._space.put(g, gradients)
        return (coefficients @ solved) / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def project_soft(self) -> Tensor | None:
        """Shrink the gradients by curvature in place: g <- g - Q^T diag(l_i / (median(l) + l_i)) Q g.

        Returns the fraction 1 - |g_after|^2 / |g|^2 that was removed (0-dim tensor), None without a memory.
        """
        if not self.active:
            return None
        gradients = self._gradients()
        g = self._take(gradients)
        coefficients, norms = self._rows.coefficients(g)
        values = self.memory.eigenvalues.to(coefficients.device)
        shrink = values / (values.median() + values)
        solved = solve_gram(self._inverse_gram, coefficients)
        self._rows.subtract(g, shrink * solved)
        self._space.put(g, gradients)
        removed = (coefficients * solved * shrink * (2 - shrink)).sum()
        return removed / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def constrain_step(self, optimizer: Optimizer) -> None:
        """``optimizer.step()``, corrected in the optimizer's own metric so that it stays in the complement.

        A step the optimizer skipped (float16 overflow) moves nothing, and so corrects nothing. Raises UsageError, before
        the step, for an optimizer whose metric is not known.
        """
        if not self.active:
            optimizer.step()
            return
        metric = metric_of(optimizer)
        optimizer.step()
        if not getattr(optimizer, "step_was_skipped", False):
            self._constraint.renew(lambda: metric(bare_optimizer(optimizer), self._parameters, self._space))
            self._correct()

    @torch.no_grad()
    def displace_step(self, optimizer: Optimizer) -> None:
        """``optimizer.step()``, then the displacement since the task's start is projected."""
        optimizer.step()
        if self.active:
            self._correct()

    @torch.no_grad()
    def leak(self) -> float | None:
        """|part of theta - a in the span of the stored Q| / |theta - a|; None without a memory or a displacement."""
        if not self.active:
            return None
        coefficients, norm = self._rows.coefficients(self._displacement())
        inside = (coefficients @ solve_gram(self._inverse_gram, coefficients)).clamp_min(0.0)
        return float((inside / norm).sqrt()) if float(norm) > 0 else None

    def state(self) -> dict[str, Any]:
        """What later steps depend on, for a checkpoint: nothing without a memory."""
        if not self.active:
            return {}
        return {"anchor": Block(self._anchor, self._space), "constraint": self._constraint.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, its blocks in any placement: a collective."""
        if self.active:
            anchor: Block = state["anchor"]
            self._anchor = anchor.to(self._space).contiguous()
            self._constraint.load_state(state["constraint"])

    @property
    def _space(self) -> VectorSpace:
        return self._rows.space

    def _take(self, tensors: list[Tensor]) -> Tensor:
        """A fresh flat copy (P_local,) of what this rank holds of ``tensors``."""
        return self._space.take(tensors)

    def _gradients(self) -> list[Tensor]:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _displacement(self) -> Tensor:
        return self._take(self._parameters).sub_(self._anchor[0])

    def _correct(self) -> None:
        """Take out of the parameters what of their displacement is not in the complement."""
        self._space.subtract(self._constraint.correction(self._displacement()), self._parameters)
