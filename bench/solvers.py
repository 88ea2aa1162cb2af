"""Top eigenpairs of a Hessian: our Lanczos beside the solvers of other libraries."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import common
from bench.networks import Batch, digits, split, trained
from bench.rivals import SOLVERS, Absent, Meter, Problem, Solved, versions
from bench.vector_memory import Held
from nostalgia.errors import UsageError
from nostalgia.linalg.subspace import principal_angles
from nostalgia.linalg.vector_space import VectorSpace

ABOUT = """\
Top eigenpairs of the Hessian of a small ViT trained on scikit-learn's digits, by several solvers: the same network,
data and loss for all. Each library's own operator is used, so products differ in cost as well as in number; the row
"our operator + scipy eigsh" tells the two apart.

columns:
  products      Hessian-vector products of the solve
  seconds       wall time of a solve, the median of --repeats; cpu is the processor time of the same (on a machine
                that others use as well, the steadier of the two)
  held          most bytes at once in the solver's vectors, measured; what a product needs inside is left out
  error         of the library's product against the float64 one, relative, for the solve's first vector
  residual      worst |H q - l q| / |l| over the k pairs, both recomputed in float64 by plain double backward
  found         pairs whose residual is at most --tol
  sine          of the largest principal angle to the reference: ARPACK in float64 to 1e-5
The libraries with power iteration look for eigenvalues of the largest magnitude, and are held against those.
"""
REFERENCE_TOL = 1e-5


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parser(
        "solvers",
        ABOUT,
        [
            "python -m bench.solvers --out solvers.json",
            "python -m bench.solvers --solvers nostalgia,curvlinops --cache vit_tiny.pt",
            "python -m bench.solvers --k 4 --num-samples 64 --epochs 2 --repeats 1   # seconds",
        ],
    )
    common.add_device(arguments)
    arguments.add_argument("--k", type=int, default=32, help="pairs (default 32)")
    arguments.add_argument("--tol", type=float, default=1e-3, help="of ours and of eigsh (default 1e-3)")
    arguments.add_argument("--num-samples", type=int, default=256, help="of the curvature set (default 256)")
    arguments.add_argument("--batch-size", type=int, default=128, help="divides --num-samples (default 128)")
    arguments.add_argument("--epochs", type=int, default=10, help="of training before (default 10)")
    arguments.add_argument("--repeats", type=int, default=3, help="timed solves, of which the median (default 3)")
    arguments.add_argument("--solvers", default=",".join(SOLVERS), help=f"default: {','.join(SOLVERS)}")
    arguments.add_argument("--cache", type=Path, help="file to keep the trained weights in, or to read them from")
    common.run(benchmark, arguments, argv)


def benchmark(options: argparse.Namespace) -> None:
    chosen = common.choices(options.solvers, list(SOLVERS), "--solvers")
    if options.num_samples % options.batch_size and options.batch_size < options.num_samples:
        raise UsageError(
            f"--num-samples {options.num_samples}: a multiple of --batch-size {options.batch_size} is allowed, for "
            "hessian-eigenthings averages batches without weights"
        )
    device = common.pick_device(options.device)
    whole = digits(8, 1797, options.seed)
    model, accuracy = trained("vit_tiny", whole, options.epochs, options.seed, options.cache)
    model.to(device)
    images, labels = (part[: options.num_samples].to(device) for part in whole)
    batches = split((images, labels), options.batch_size)
    problem = Problem(model, batches, options.k, options.tol, options.seed, device)
    judge = Judge.of(problem)
    rows = measure(problem, chosen, judge, options.repeats)
    comparison = compare(rows)
    results = {
        "benchmark": "solvers",
        "network": {
            "parameters": judge.size,
            "accuracy": accuracy,
            "loss": judge.loss,
            "top_eigenvalue": float(judge.values[0]),
            "eigenvalue_k": float(judge.values[options.k - 1]),
        },
        "rows": rows,
        "comparison": comparison,
    }
    common.report(options, device, results, [_table(rows, options, judge), *_sentences(comparison)])


def measure(problem: Problem, chosen: Sequence[str], judge: Judge, repeats: int) -> list[dict[str, Any]]:
    """A row a solver. Timed solves take turns, so that all meet the same load; slow ones run once."""
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[Solved]] = {}
    for name in chosen:  # once, untimed where it can be: warm-up, and what is held
        solver = SOLVERS[name]
        rows[name] = {"solver": name, "title": solver.title}
        try:
            rows[name]["versions"] = versions(solver.packages)
            solved = solver.solve(problem, Meter(problem.device, Held(numpy=not solver.slow)))
        except Absent as reason:
            rows[name]["absent"] = str(reason)
            continue
        rows[name].update(judge.judge(solved, problem.tol), held_bytes=solved.held_bytes)
        times[name] = [solved] if solver.slow else []
    for _ in range(repeats):
        for name, taken in times.items():
            if not SOLVERS[name].slow:
                taken.append(SOLVERS[name].solve(problem, Meter(problem.device)))
    for name, taken in times.items():
        rows[name]["products"] = taken[-1].products
        rows[name]["seconds"] = statistics.median(solved.seconds for solved in taken)
        rows[name]["cpu_seconds"] = statistics.median(solved.cpu_seconds for solved in taken)
        rows[name]["all_seconds"] = [solved.seconds for solved in taken]
        rows[name]["all_cpu_seconds"] = [solved.cpu_seconds for solved in taken]
    return list(rows.values())


@dataclass
class Judge:
    """The Hessian in float64 by plain double backward, and its top eigenpairs: what all solvers are held against."""

    product: Callable[[Tensor], Tensor]
    size: int
    loss: float
    values: Tensor  # (m,) by magnitude, m >= k
    vectors: Tensor  # (m, P)
    k: int

    @classmethod
    def of(cls, problem: Problem) -> Judge:
        product, size, loss = _double_backward(problem.model, problem.batches)
        margin = 8
        while True:
            values, vectors = _magnitude_pairs(product, size, min(problem.k + margin, size - 1), problem)
            if int((values > 0).sum()) >= problem.k:
                return cls(product, size, loss, values, vectors, problem.k)
            margin *= 2

    def judge(self, solved: Solved, tol: float) -> dict[str, Any]:
        vectors = solved.eigenvectors
        residuals = torch.stack(
            [
                (self.product(q) - value * q).norm() / abs(value)
                for q, value in zip(vectors, solved.eigenvalues.tolist(), strict=True)
            ]
        )
        orthonormal = torch.linalg.qr(vectors.T)[0].T.contiguous()
        space = VectorSpace.of({"q": vectors[0]}, placement="local")
        sine = float(principal_angles(orthonormal, self._reference(solved.order), space)[-1].sin())
        v, product = (part.to(vectors.device) for part in solved.first_product)
        exact = self.product(v)
        return {
            "order": solved.order,
            "product_error": float((product - exact).norm() / exact.norm()),
            "worst_residual": float(residuals.max()),
            "found": int((residuals <= tol).sum()),
            "sine": sine,
            "eigenvalues": solved.eigenvalues.tolist(),
        }

    def _reference(self, order: str) -> Tensor:
        if order == "magnitude":
            return self.vectors[: self.k]
        return self.vectors[self.values > 0][: self.k]


def _double_backward(model: nn.Module, batches: list[Batch]) -> tuple[Callable[[Tensor], Tensor], int, float]:
    """v (P,) -> H v in float64 of the mean loss, from graphs kept for all batches; P, and the loss."""
    model = copy.deepcopy(model).double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples = sum(len(labels) for _, labels in batches)
    graphs, total = [], 0.0
    with sdpa_kernel(SDPBackend.MATH):
        for images, labels in batches:
            loss = F.cross_entropy(model(images.double()), labels, reduction="sum") / samples
            total += float(loss.detach())
            graphs.append(torch.autograd.grad(loss, parameters, create_graph=True))
    sizes, shapes = [p.numel() for p in parameters], [p.shape for p in parameters]

    def product(v: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(v.split(sizes), shapes, strict=True)]
        result = torch.zeros_like(v)
        for gradients in graphs:
            pulled = torch.autograd.grad(gradients, parameters, parts, retain_graph=True)
            result += torch.cat([t.reshape(-1) for t in pulled])
        return result

    return product, sum(sizes), total


def _magnitude_pairs(
    product: Callable[[Tensor], Tensor], size: int, count: int, problem: Problem
) -> tuple[Tensor, Tensor]:
    """The ``count`` pairs of the largest magnitude, by ARPACK in float64."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    def on_arrays(x: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(x.reshape(-1)).to(problem.device)).cpu().numpy()

    linear = LinearOperator((size, size), matvec=on_arrays, dtype=np.float64)
    start = np.random.default_rng(problem.seed + 1).standard_normal(size)
    values, vectors = eigsh(linear, k=count, which="LM", tol=REFERENCE_TOL, v0=start)
    order = np.argsort(-np.abs(values))
    return torch.from_numpy(values[order]), torch.from_numpy(vectors.T[order].copy()).to(problem.device)


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours against curvlinops with eigsh, where both ran."""
    named = {row["solver"]: row for row in rows if "absent" not in row}
    if not {"nostalgia", "curvlinops"} <= named.keys():
        return {}
    us, them = named["nostalgia"], named["curvlinops"]
    return {
        "products": [us["products"], them["products"]],
        "time_ratio": us["seconds"] / them["seconds"],
        "cpu_ratio": us["cpu_seconds"] / them["cpu_seconds"],
    }


def _sentences(comparison: dict[str, Any]) -> list[str]:
    if not comparison:
        return []
    ours, theirs = comparison["products"]
    return [
        f"against curvlinops + eigsh: {ours} products to {theirs}, {comparison['time_ratio']:.0%} of its time "
        f"({comparison['cpu_ratio']:.0%} of its processor time)"
    ]


def _table(rows: Sequence[dict[str, Any]], options: argparse.Namespace, judge: Judge) -> Any:
    title = (
        f"Top {options.k} eigenpairs, P = {judge.size}, {options.num_samples} samples, tolerance {options.tol:g}; "
        f"eigenvalues {float(judge.values[0]):.3g} to {float(judge.values[options.k - 1]):.3g}"
    )
    result = common.table(title, ["solver", "products", "seconds", "cpu", "held", "error", "residual", "found", "sine"])
    for row in rows:
        if "absent" in row:
            result.add_row(row["title"], f"absent: {row['absent']}")
            continue
        result.add_row(
            row["title"],
            str(row["products"]),
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['held_bytes'] / 2**20:.1f} MiB",
            f"{row['product_error']:.1e}",
            f"{row['worst_residual']:.1e}",
            f"{row['found']}/{options.k}",
            f"{row['sine']:.1e}",
        )
    return result


if __name__ == "__main__":
    main()
