"""Keeps training steps inside the complement of the memory's subspace.

With Q (m, P) the memory's orthonormal rows, g the synchronised gradient and a the parameters at the start of the task:

* gradient:     g <- g - Q^T (Q g)
* displacement: theta <- a + (I - Q^T Q)(theta - a) after the optimizer's step
* constrained:  d = d0 - D^-1 Q^T (Q D^-1 Q^T)^-1 Q d0, with d0 the optimizer's own step and D its metric

The products are global: one coefficient a row over all projected parameters and ranks, not one a layer. Rows stored in
bfloat16 are no longer orthonormal; the inverse of their Gram matrix takes the place of the identity then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.linalg.precision import full_precision_matmul
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection.memory import CurvatureMemory

# Columns of Q handled at once where Q cannot be used as it lies (another dtype, or scaled by the metric): small enough
# that the scaled copy stays in the cache, large enough to keep a GPU busy.
CHUNK = {"cpu": 1 << 14, "cuda": 1 << 17}
# Rows of Q times all earlier ones at once: half of a symmetric matrix is enough. A GPU wants fewer, larger calls.
ROWS = {"cpu": 64, "cuda": 256}
METRIC_FLOOR = 0.1  # of the metric's root mean square: see _inverse_metric


class GradientProjector:
    """Projects gradients and optimizer steps of ``parameters`` away from ``memory``.

    ``parameters`` maps names to the parameters in training (plain or DTensor), in the order and of the shapes the
    memory was computed with. An empty memory projects nothing. The parameters' values at construction are the anchor
    from which `leak` and `displace_step` measure.
    """

    def __init__(
        self, memory: CurvatureMemory, parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter]
    ) -> None:
        self.memory = memory
        if not isinstance(parameters, Mapping):
            parameters = {str(i): p for i, p in enumerate(parameters)}
        self._parameters = list(parameters.values())
        self.anchor: Tensor | None = None  # (P_local,)
        if self.active:
            memory.check_layout(parameters)
            self._inverse_gram = memory.inverse_gram()  # (m, m) float64, None where rows are orthonormal
            self.anchor = self._take(self._parameters)

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
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters]
        g = self._take(gradients)
        coefficients, norms = self._coefficients(g)
        solved = self._solve_gram(coefficients)
        self._subtract(g, solved)
        self._space.put(g, gradients)
        return (coefficients @ solved) / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def project_soft(self) -> Tensor | None:
        """Shrink the gradients by curvature in place: g <- g - Q^T diag(l_i / (median(l) + l_i)) Q g.

        Returns the fraction 1 - |g_after|^2 / |g|^2 that was removed (0-dim tensor), None without a memory.
        """
        if not self.active:
            return None
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters]
        g = self._take(gradients)
        coefficients, norms = self._coefficients(g)
        values = self.memory.eigenvalues.to(coefficients.device)
        shrink = values / (values.median() + values)
        solved = self._solve_gram(coefficients)
        self._subtract(g, shrink * solved)
        self._space.put(g, gradients)
        removed = (coefficients * solved * shrink * (2 - shrink)).sum()
        return removed / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def constrain_step(self, optimizer: Optimizer) -> None:
        """``optimizer.step()``, corrected in the optimizer's own metric so that it stays in the complement.

        A step the optimizer skipped (float16 overflow, accumulation) moves nothing, and so corrects nothing.
        """
        if not self.active:
            optimizer.step()
            return
        before = self._take(self._parameters)
        optimizer.step()
        step = self._take(self._parameters).sub_(before)  # (P_local,) d0
        inverse_metric = self._inverse_metric(optimizer)
        system, coefficients = self._constraint_system(step, inverse_metric)
        correction = torch.zeros_like(step)
        self._subtract(correction, torch.linalg.solve_ex(system, coefficients)[0])
        if inverse_metric is not None:
            correction.mul_(inverse_metric)
        self._space.put(before.add_(step).add_(correction), self._parameters)

    @torch.no_grad()
    def displace_step(self, optimizer: Optimizer) -> None:
        """``optimizer.step()``, then the displacement since the task's start is projected."""
        optimizer.step()
        if not self.active:
            return
        assert self.anchor is not None
        displacement = self._take(self._parameters).sub_(self.anchor)
        coefficients, _ = self._coefficients(displacement)
        self._subtract(displacement, self._solve_gram(coefficients))
        self._space.put(displacement.add_(self.anchor), self._parameters)

    def step(self, optimizer: Optimizer, project: str) -> None:
        """``optimizer.step()``, corrected as ``project`` says: constrained, displacement, or not at all."""
        if project == "constrained":
            self.constrain_step(optimizer)
        elif project == "displacement":
            self.displace_step(optimizer)
        else:
            optimizer.step()

    @torch.no_grad()
    def leak(self) -> float | None:
        """|part of theta - a in the span of the stored Q| / |theta - a|; None without a memory or a displacement."""
        if not self.active:
            return None
        assert self.anchor is not None
        displacement = self._take(self._parameters).sub_(self.anchor)
        coefficients, norm = self._coefficients(displacement)
        inside = (coefficients @ self._solve_gram(coefficients)).clamp_min(0.0)
        return float((inside / norm).sqrt()) if float(norm) > 0 else None

    def whole_anchor(self) -> Tensor:
        """The anchor (P,) whole on every rank, for a checkpoint; only with a memory."""
        assert self.anchor is not None
        return self._space.gather_flat(self.anchor[None])[0]

    def set_anchor(self, anchor: Tensor) -> None:
        """Measure from ``anchor`` (P,), what `whole_anchor` gave, instead of from the parameters at construction."""
        self.anchor = self._space.slice_flat(anchor[None])[0].to(self._space.device).contiguous()

    @property
    def _space(self) -> VectorSpace:
        space = self.memory.space
        assert space is not None
        return space

    @property
    def _basis(self) -> Tensor:  # (m, P_local)
        basis = self.memory.basis
        assert basis is not None
        return basis

    def _take(self, tensors: list[Tensor]) -> Tensor:
        """A fresh flat copy (P_local,) of what this rank holds of ``tensors``."""
        return self._space.take(tensors)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Column blocks of Q in the vectors' dtype; one block, without a copy, where Q is stored in it."""
        basis, dtype = self._basis, self._space.dtype
        if basis.dtype == dtype:
            yield slice(0, basis.shape[1]), basis
            return
        for columns in self._columns():
            yield columns, basis[:, columns].to(dtype)

    def _columns(self) -> Iterator[slice]:
        width, size = CHUNK.get(self._basis.device.type, CHUNK["cuda"]), self._basis.shape[1]
        for start in range(0, size, width):
            yield slice(start, min(start + width, size))

    def _coefficients(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Q v (m,) and |v|^2 in float64, one small all-reduce for both."""
        partial = torch.zeros(self._basis.shape[0] + 1, dtype=torch.float64, device=vector.device)
        for columns, block in self._chunks():
            partial[:-1] += torch.mv(block, vector[columns])
        partial[-1] = torch.dot(vector, vector) if vector.numel() else 0.0
        self._space.all_reduce(partial)
        return partial[:-1], partial[-1]

    def _solve_gram(self, coefficients: Tensor) -> Tensor:
        return coefficients if self._inverse_gram is None else self._inverse_gram @ coefficients

    def _subtract(self, vector: Tensor, coefficients: Tensor) -> None:
        """``vector -= Q^T coefficients`` in place."""
        weights = coefficients.to(vector.dtype)
        for columns, block in self._chunks():
            vector[columns].addmv_(block.T, weights, alpha=-1)

    def _constraint_system(self, step: Tensor, inverse_metric: Tensor | None) -> tuple[Tensor, Tensor]:
        """Q D^-1 Q^T (m, m) and Q d0 (m,) in float64: one pass over Q, one small all-reduce, no scaled copy of Q."""
        if inverse_metric is None:
            coefficients, _ = self._coefficients(step)
            return self._identity_or_gram(), coefficients
        m = self._basis.shape[0]
        rows = ROWS.get(step.device.type, ROWS["cuda"])
        partial = torch.zeros(m, m + 1, dtype=torch.float64, device=step.device)
        # The metric enters as its square root on both sides: the system stays symmetric to rounding.
        root = inverse_metric.sqrt()
        stretched = step / root
        for columns in self._columns():
            scaled = self._basis[:, columns] * root[columns]
            with full_precision_matmul(step.device.type):
                for start in range(0, m, rows):
                    stop = min(start + rows, m)
                    partial[start:stop, :stop] += scaled[start:stop] @ scaled[:stop].T
                partial[:, m] += torch.mv(scaled, stretched[columns])
        system = partial[:, :m]
        system.copy_(system.tril() + system.tril(-1).T)
        self._space.all_reduce(partial)
        return partial[:, :m], partial[:, m]

    def _identity_or_gram(self) -> Tensor:
        if self._inverse_gram is not None:
            return torch.linalg.inv(self._inverse_gram)
        return torch.eye(self._basis.shape[0], dtype=torch.float64, device=self._basis.device)

    def _inverse_metric(self, optimizer: Optimizer) -> Tensor | None:
        """1 / D (P_local,): D = sqrt(v_hat) + eps for Adam-like optimizers, None (the identity) for the others.

        D is floored at a tenth of its root mean square: any positive D keeps Q d = 0, and without the floor
        coordinates whose second moment is near zero would take most of the correction.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        state = optimizer.state
        if not all("exp_avg_sq" in state.get(p, {}) for p in self._parameters):
            return None
        metric = self._take([state[p]["exp_avg_sq"] for p in self._parameters])
        scale, epsilon = self._per_parameter(
            lambda p: 1.0 - groups[id(p)]["betas"][1] ** float(state[p]["step"]), lambda p: groups[id(p)]["eps"]
        )
        metric.div_(scale).sqrt_().add_(epsilon)
        root_mean_square = self._space.norm(metric) / self._space.size**0.5
        return metric.clamp_min_(METRIC_FLOOR * float(root_mean_square)).reciprocal_()

    def _per_parameter(self, *values: Callable[[nn.Parameter], float]) -> list[float | Tensor]:
        """Each value per parameter: a number where all parameters agree, else spread to (P_local,)."""
        result: list[float | Tensor] = []
        for value in values:
            numbers = [value(p) for p in self._parameters]
            if len(set(numbers)) == 1:
                result.append(numbers[0])
            else:
                spread = [torch.full_like(p, number) for p, number in zip(self._parameters, numbers, strict=True)]
                result.append(self._take(spread))
        return result
