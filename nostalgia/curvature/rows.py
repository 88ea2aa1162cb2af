"""Top eigenpairs of a Gauss-Newton matrix from one pass: gradients of single samples as rows, and the SVD of the rows.

    G = 1/N sum_n J_n^T M_n J_n = E[ X^T X ],   X's rows J_n^T u_n / N^(1/2),   E u_n u_n^T = M_n

J_n is the Jacobian of sample n's outputs, M_n the loss's metric in them, u_n drawn as signs through a root of M_n (or all of
the root's columns, which makes X^T X = G). One pass costs a forward and as many backward passes as there are rows a sample,
where Lanczos takes tens of products over the same samples. What is found are eigenpairs of X^T X: for few samples its top
eigenvalues are too large, and `captured_energy` on samples held out says what the eigenvectors are worth.

The SVD goes through the rows' Gram matrix. Where the rows do not fit, they are reduced to the top ``keep`` whenever the
buffer is full. What is cut away is positive semi-definite and of a norm of at most the sum of the first eigenvalues cut: this
sum bounds the residual of every pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.base import Parameters, parameters_in_scope
from nostalgia.curvature.batches import num_rows, rows_of, to_device
from nostalgia.curvature.context import fix_randomness, product_context, value_dtype
from nostalgia.curvature.cotangents import OutputMetric, sample_numbers
from nostalgia.curvature.layers import Layer, Pass, recorded
from nostalgia.curvature.losses import IGNORED
from nostalgia.curvature.network import Network
from nostalgia.curvature.sample_gradients import autograd_gradients, layer_gradients, layers_by_formula
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.subspace import polish_
from nostalgia.linalg.vector_space import VectorSpace


class GradientRows:
    """Gradients of single samples, spread over ranks: an iterable of blocks (m, P_local) whose X^T X sums to N G.

    All ranks iterate together: each computes the rows of its own samples, in pieces of at most ``piece_bytes``, and one
    exchange a piece gives every rank its part of all ranks' rows. ``num_samples`` is N, known after an iteration.
    ``draws``: random rows a sample; all of the metric's root where the network has no more outputs than that.
    """

    def __init__(
        self,
        model: nn.Module,
        forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
        batches: Iterable[Any],
        parameters: Parameters = None,
        accelerator: Accelerator | None = None,
        *,
        draws: int = 1,
        loss: str = "cross_entropy",
        seed: int = 0,
        precision: str = "float32",
        piece_bytes: int = 2**27,
        space: VectorSpace | None = None,
    ) -> None:
        OutputMetric(loss, 1.0, draws, seed, False)  # refuses what cannot be
        scope = parameters_in_scope(model, parameters)
        first = next(iter(scope.values()))
        self.device = accelerator.device if accelerator is not None else first.device
        dtype = value_dtype(precision, first.dtype)
        self.network = Network(model, forward_fn, tuple(scope), self.device, dtype)
        self.space = space or VectorSpace.of(scope, dtype=dtype, device=self.device)
        self.draws, self.loss, self.seed, self.precision = draws, loss, seed, precision
        self.batches = list(batches)
        self.before, self.total = sample_numbers(self.batches, self.space, "curvature")
        self.num_samples = 0
        self.piece = max(1, piece_bytes // (4 * self.space.size * self.space.zeros(0).element_size()))
        self._layers: list[Layer] | None = None
        self._loose: list[str] = []

    @property
    def rows_at_most(self) -> tuple[int, int]:
        """Rows of one block, and of a whole iteration, at most."""
        return self.piece * self.space.world_size, self.total * self.draws

    def __iter__(self) -> Iterator[Tensor]:
        space, counted = self.space, 0
        pieces, none = self._pieces(), torch.zeros(0, space.size, dtype=space.dtype, device=self.device)
        while True:
            # Not around the yield: what is done with a block must not run in the network's precision.
            with product_context(self.precision, self.device):
                found = next(pieces, None)
            rows = none if found is None else found[0]
            counted += 0 if found is None else found[1]
            block = space.exchange_rows(rows)
            if block is None:
                break
            yield block
        self.num_samples = int(space.all_reduce(torch.tensor([counted], dtype=torch.float64, device=self.device)))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[Tensor, int]]:
        """Rows (B, P) of this rank's samples, a piece and a draw at a time, and the samples that count first in them."""
        number = self.before
        for index, batch in enumerate(self.batches):
            for start in range(0, num_rows(batch), self.piece):
                piece = to_device(rows_of(batch, start, start + self.piece), self.device, self.network.dtype)
                fix_randomness(index, self.device)
                yield from self._rows(piece, number)
                number += num_rows(piece)

    def _rows(self, piece: Any, number: int) -> Iterator[tuple[Tensor, int]]:
        if self._layers is None:
            self._choose_layers(piece)
        assert self._layers is not None
        with recorded({layer.name: layer.module for layer in self._layers}) as take:
            passed = self._forward(piece, take)
        cotangents, counts = self._cotangents(passed, number)
        for place, u in enumerate(cotangents):
            last = place == len(cotangents) - 1
            rows = layer_gradients(self.network, passed, u, self._layers, retain=not last)
            rows.update(autograd_gradients(self.network, piece, u, self._loose))
            flat = torch.cat([rows[name].flatten(1) for name in self.network.names], dim=1).to(self.space.dtype)
            yield flat, counts if place == 0 else 0

    def _forward(self, piece: Any, take: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Pass:
        with torch.enable_grad():
            outputs, targets = self.network(self.network.theta, piece)
        if outputs.ndim != 2:
            raise UsageError(f"outputs of shape {tuple(outputs.shape)}: curvature.solver=rows needs (samples, classes)")
        return Pass(outputs, targets, *take())

    def _cotangents(self, passed: Pass, number: int) -> tuple[list[Tensor], int]:
        logits, targets = passed.outputs.detach(), passed.targets
        logits = logits.to(self.network.dtype)
        metric = OutputMetric(self.loss, 1.0, self.draws, self.seed, exact=logits.shape[1] <= self.draws)
        found = metric.cotangents(logits, number)
        if self.loss == "mse":
            return [u.to(passed.outputs.dtype) for u in found], len(logits)
        mass = targets.sum(-1) if targets.is_floating_point() else targets != IGNORED
        weight = mass.to(logits.dtype).sqrt()[:, None]
        counts = len(logits) if targets.is_floating_point() else int(mass.sum())
        return [(u * weight).to(passed.outputs.dtype) for u in found], counts

    def _choose_layers(self, piece: Any) -> None:
        """Biases, norms and embeddings go sample by sample, and weights that their layer's formula is not that of."""
        self._layers = layers_by_formula(self.network, piece, self.precision, each_sample=True)
        covered = {name for layer in self._layers for name in layer.parameters}
        self._loose = [name for name in self.network.names if name not in covered]


class _Sketch:
    """The rows of X so far (m, P_local), or the top of them: U^T X, U the top eigenvectors of X X^T."""

    def __init__(self, space: VectorSpace, capacity: int, keep: int) -> None:
        self.space, self.keep, self.used = space, keep, 0
        self.block = space.zeros(capacity)
        self.cut = 0.0  # sum of the first eigenvalues cut away
        self.squares = torch.zeros(1, dtype=torch.float64, device=space.device)  # of all rows' numbers here

    def add(self, rows: Tensor) -> None:
        if self.used + len(rows) > len(self.block):
            values, vectors = self.eigen()
            if len(values) > self.keep:
                self.cut += float(values[self.keep])
            chosen = vectors[:, : self.keep].T
            self.space.combine_(chosen, self.block[: self.used])
            self.used = len(chosen)
        self.squares += torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2
        self.block[self.used : self.used + len(rows)] = rows
        self.used += len(rows)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,), decreasing, and eigenvectors (m, m) of X X^T: float64 on CPU; one small all-reduce."""
        rows = self.block[: self.used]
        gram = self.space.gram(rows, rows).cpu()
        if not bool(torch.isfinite(gram).all()):
            raise RunFailedError(
                "gradients of single samples are not finite: activations or gradients overflow at these parameters; try "
                "curvature.precision=float64 or a smaller train.lr"
            )
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        return values.flip(0), vectors.flip(1)


@torch.no_grad()
def eigenpairs_of_rows(
    rows: GradientRows, k: int, *, tol: float = 1e-2, budget_bytes: int = 2**30, mask: Tensor | None = None
) -> Eigenpairs:
    """The ``k`` largest eigenpairs of the rows' X^T X, fewer where its rank is less; all ranks call it.

    ``mask`` (P_local,) is 1 at the coordinates that count and 0 at those held constant; by default all count.
    ``budget_bytes`` bounds the rows held on a rank (never below what 2 k + 16 rows and a block take). ``residuals`` are 0
    but for rounding where all fit, else a bound in X^T X; a pair counts as converged when that is at most ``tol`` lambda.
    ``products`` is 0. The same for any number of ranks to rounding where all rows fit, else within the bound.
    """
    space = rows.space
    if not 1 <= k <= space.size:
        raise UsageError(f"top_k={k}: allowed is 1 to {space.size}, the number of parameters the curvature is over")
    started, traffic = time.perf_counter(), space.traffic.snapshot()
    block, total = rows.rows_at_most
    keep = 2 * k + 16
    fits = budget_bytes // max(1, max(space.layout.local_sizes) * space.zeros(0).element_size())
    sketch = _Sketch(space, min(total, max(fits, keep + block)), keep)
    for part in rows:
        sketch.add(part if mask is None else part * mask)
    values, vectors = sketch.eigen()
    floor = len(values) * torch.finfo(space.dtype).eps * float(values[0].clamp_min(0.0))
    count = min(k, int((values > floor).sum()))
    if count == 0:
        raise RunFailedError("the Gauss-Newton matrix is zero on all samples: there is no direction to keep")
    coefficients = vectors[:, :count].T / values[:count, None].sqrt()
    basis = polish_(space.combine_(coefficients, sketch.block[: sketch.used]).clone(), space)
    values = values[:count] / rows.num_samples
    residuals = torch.full_like(values, sketch.cut / rows.num_samples)
    trace = float(space.all_reduce(sketch.squares)) / rows.num_samples
    moved = space.traffic.since(traffic)
    return Eigenpairs(
        eigenvalues=values,
        eigenvectors=basis,
        residuals=residuals,
        converged=residuals <= tol * values,
        products=0,
        collectives=moved.large + moved.small,
        bytes_moved=moved.bytes,
        seconds=time.perf_counter() - started,
        tol=tol,
        space=space,
        trace=trace,
    )


@torch.no_grad()
def captured_energy(rows: GradientRows, basis: Tensor, mask: Tensor | None = None) -> float:
    """tr(Q^T G Q) / tr G for orthonormal rows Q = ``basis`` (k, P_local), G over the samples of ``rows``: 0 to 1.

    ``mask`` as in `eigenpairs_of_rows`: G is that of the coordinates that count.
    An unbiased estimate of numerator and denominator, exact where all outputs are enumerated; all ranks call it.
    """
    space = rows.space
    inside, trace = 0.0, 0.0
    for found in rows:
        block = found if mask is None else found * mask
        inside += float(space.gram(basis, block).square().sum())
        trace += float(space.all_reduce(block.double().square().sum()[None]))
    return inside / trace if trace > 0 else 0.0
