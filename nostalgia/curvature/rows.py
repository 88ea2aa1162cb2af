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
from nostalgia.curvature.layers import Layer, Pass, find_layers, input_rows, output_gradients, output_rows, recorded
from nostalgia.curvature.losses import IGNORED
from nostalgia.curvature.network import Network
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.subspace import polish_
from nostalgia.linalg.vector_space import VectorSpace

# Of a layer's gradient by its own formula from autograd's, relative: far above rounding, far below another formula.
AGREE = {torch.float64: 1e-8, torch.float32: 1e-2}


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
            rows = self._by_layers(passed, u, self._layers, retain=not last)
            rows.update(self._by_samples(piece, u, self._loose))
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
        """Layers whose own formula gives autograd's gradient of a sample; all other parameters go sample by sample.

        Left to autograd: biases, norms and embeddings, weights that are used twice or without their module's forward.
        """
        layers, _ = find_layers(self.network)
        two = rows_of(piece, 0, 2)
        with recorded({layer.name: layer.module for layer in layers}) as take:
            passed = self._forward(two, take)
        layers = [layer for layer in layers if layer.name in passed.layer_outputs]
        u = torch.randn(passed.outputs.shape, generator=torch.Generator().manual_seed(0)).to(passed.outputs)
        names = [name for layer in layers for name in layer.parameters]
        ours, theirs = self._by_layers(passed, u, layers, retain=False), self._by_samples(two, u, names)
        tolerance = 0.1 if self.precision in ("bf16", "tf32") else AGREE[self.network.dtype]
        self._layers = [
            layer
            for layer in layers
            if all(
                float((ours[name] - theirs[name]).norm()) <= tolerance * float(theirs[name].norm())
                for name in layer.parameters
            )
        ]
        covered = {name for layer in self._layers for name in layer.parameters}
        self._loose = [name for name in self.network.names if name not in covered]

    def _by_layers(self, passed: Pass, u: Tensor, layers: list[Layer], retain: bool) -> dict[str, Tensor]:
        """Gradients (B, ...) of each sample in the layers' parameters, from inputs x and output gradients g: sum_t g x^T."""
        theta = dict(zip(self.network.names, self.network.theta, strict=True))
        dtype = self.network.dtype
        found = output_gradients(passed, u, (layer.name for layer in layers), retain) if layers else {}
        rows: dict[str, Tensor] = {}
        for layer in layers:
            if layer.name not in found:
                rows.update({name: theta[name].new_zeros(len(u), theta[name].numel()) for name in layer.parameters})
                continue
            x = input_rows(layer.base, passed.inputs[layer.name]).to(dtype)  # (B, T, i)
            g = output_rows(layer.base, found[layer.name]).to(dtype)  # (B, T, o)
            if layer.scaling is None:
                rows[layer.parameters[0]] = (g.mT @ x).flatten(1)
                continue
            for name in layer.parameters:
                if ".lora_A." in name:
                    b = self._value(name.replace(".lora_A.", ".lora_B."), theta).flatten(1)
                    rows[name] = (layer.scaling * (g @ b).mT @ x).flatten(1)
                else:
                    a = self._value(name.replace(".lora_B.", ".lora_A."), theta).flatten(1)
                    rows[name] = (layer.scaling * g.mT @ (x @ a.T)).flatten(1)
        return rows

    def _value(self, name: str, theta: dict[str, Tensor]) -> Tensor:
        return theta[name].detach() if name in theta else self.network.constant(name)

    def _by_samples(self, piece: Any, u: Tensor, names: list[str]) -> dict[str, Tensor]:
        """The same (B, numel) for any parameters, by a forward and a backward pass of each sample."""
        theta = dict(zip(self.network.names, self.network.theta, strict=True))
        rows = {name: theta[name].new_empty(len(u), theta[name].numel()) for name in names}
        for number in range(len(u)) if names else ():
            with torch.enable_grad():
                outputs, _ = self.network(self.network.theta, rows_of(piece, number, number + 1))
            found = torch.autograd.grad(
                outputs,
                [theta[name] for name in names],
                u[number : number + 1],
                allow_unused=True,
                materialize_grads=True,
            )
            for name, gradient in zip(names, found, strict=True):
                rows[name][number] = gradient.flatten()
        return rows


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
