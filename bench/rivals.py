"""Eigensolvers side by side: ours, hessian-eigenthings, PyHessian, and curvlinops with scipy's ARPACK.

Each is a function ``(problem) -> Solved`` that is given the same network, data and loss, in the network's own
precision. What a library cannot do here is an `Absent` with the reason, never a row left out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import synchronise
from bench.networks import Batch, loss_fn
from bench.vector_memory import Held
from nostalgia import HessianOperator, lanczos


class Absent(Exception):
    """Why a solver cannot be compared here."""


@dataclass
class Problem:
    """What every solver is given."""

    model: nn.Module
    batches: list[Batch]  # of equal size: hessian-eigenthings averages batches without weights
    k: int
    tol: float
    seed: int
    device: torch.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass
class Solved:
    """A solve as it was, in its own order of eigenvalues."""

    eigenvalues: Tensor  # (k,) float64
    eigenvectors: Tensor  # (k, P) float64, unit rows
    order: str  # "largest" or "magnitude": what the solver looks for
    products: int
    first_product: tuple[Tensor, Tensor]  # v (P,) and H v (P,) as the library's operator gave it
    seconds: float
    cpu_seconds: float
    held_bytes: int | None = None  # None where it was not measured in this run


@dataclass
class Meter:
    """Counts products, and times the solve; with ``held`` also the vectors held between products."""

    device: torch.device
    held: Held | None = None
    products: int = 0
    first: tuple[Tensor, Tensor] | None = None
    _start: tuple[float, float] = field(default=(0.0, 0.0))
    elapsed: tuple[float, float] = (0.0, 0.0)

    def count(self, product: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.products += 1
            with contextlib.ExitStack() as stack:
                results = [] if self.held is None else stack.enter_context(self.held.paused())
                result = product(*args)
                results.append(result)
                if self.first is None:
                    # PyHessian's products are (v . H v, H v).
                    answer = result[1] if isinstance(result, tuple) else result
                    self.first = _flat(args[0]), _flat(answer)
            return result

        return counted

    @contextmanager
    def running(self) -> Iterator[None]:
        synchronise(self.device)
        self._start = (time.perf_counter(), time.process_time())
        with contextlib.ExitStack() as stack:
            if self.held is not None:
                stack.enter_context(self.held)
            yield
            synchronise(self.device)
        self.elapsed = (time.perf_counter() - self._start[0], time.process_time() - self._start[1])

    def solved(self, eigenvalues: Tensor, eigenvectors: Tensor, order: str) -> Solved:
        """Eigenvectors (k, P) are normalised: what is compared is their direction."""
        assert self.first is not None, "a solve takes products"
        vectors = eigenvectors.detach().to(self.device).double()
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        return Solved(
            eigenvalues.detach().double().cpu(),
            vectors,
            order,
            self.products,
            self.first,
            *self.elapsed,
            None if self.held is None else self.held.peak,
        )


def _flat(vector: Any) -> Tensor:
    """A copy (P,) in float64 of a vector in any of the libraries' forms."""
    if isinstance(vector, np.ndarray):
        vector = torch.from_numpy(vector)
    parts = vector if isinstance(vector, list) else [vector]
    return torch.cat([part.detach().reshape(-1).double() for part in parts])


def ours(problem: Problem, meter: Meter) -> Solved:
    """`nostalgia.linalg.lanczos` with its defaults on `HessianOperator` with its own."""
    operator = HessianOperator(problem.model, loss_fn, problem.batches, problem.parameters)
    operator.matvec = meter.count(operator.matvec)  # type: ignore[method-assign]
    with meter.running():
        pairs = lanczos(operator, problem.k, tol=problem.tol, seed=problem.seed)
    return meter.solved(pairs.eigenvalues, pairs.eigenvectors, "largest")


def eigsh_on_ours(problem: Problem, meter: Meter) -> Solved:
    """ARPACK on our operator: what of the difference is the solver's."""
    operator = HessianOperator(problem.model, loss_fn, problem.batches, problem.parameters)

    def product(x: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(x.reshape(-1)).to(operator.device)
        return operator.matvec(v).cpu().numpy()

    return _eigsh(problem, meter, operator.size, product)


def curvlinops(problem: Problem, meter: Meter) -> Solved:
    """`curvlinops.HessianLinearOperator` with `scipy.sparse.linalg.eigsh`."""
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        problem.model, nn.CrossEntropyLoss(), problem.parameters, problem.batches, check_deterministic=False
    )
    linear = operator.to_scipy()
    with sdpa_kernel(SDPBackend.MATH):
        return _eigsh(problem, meter, linear.shape[0], lambda x: linear @ x.reshape(-1))


def _eigsh(problem: Problem, meter: Meter, size: int, product: Callable[[np.ndarray], np.ndarray]) -> Solved:
    from scipy.sparse.linalg import LinearOperator, eigsh

    dtype = np.float64 if problem.parameters[0].dtype == torch.float64 else np.float32
    linear = LinearOperator((size, size), matvec=meter.count(product), dtype=dtype)
    start = np.random.default_rng(problem.seed).standard_normal(size).astype(dtype)
    with meter.running():
        values, vectors = eigsh(linear, k=problem.k, which="LA", tol=problem.tol, v0=start)
    order = torch.from_numpy(values.copy()).argsort(descending=True)
    return meter.solved(torch.from_numpy(values)[order], torch.from_numpy(vectors).T[order], "largest")


def eigenthings_lanczos(problem: Problem, meter: Meter) -> Solved:
    """hessian-eigenthings' ``lanczos``, its defaults (2 k products, by magnitude)."""
    from hessian_eigenthings.algorithms.lanczos import lanczos as theirs

    return _eigenthings(problem, meter, theirs)


def eigenthings_power(problem: Problem, meter: Meter) -> Solved:
    """hessian-eigenthings' ``deflated_power_iteration``, its defaults (at most 100 products a pair)."""
    from hessian_eigenthings.algorithms.power_iteration import deflated_power_iteration

    return _eigenthings(problem, meter, deflated_power_iteration)


def _eigenthings(problem: Problem, meter: Meter, solve: Callable[..., Any]) -> Solved:
    from hessian_eigenthings.operators.hessian import HessianOperator as Theirs

    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    operator: Any = Theirs(problem.model, problem.batches, mean_loss)
    operator.matvec = meter.count(operator.matvec)
    with sdpa_kernel(SDPBackend.MATH), meter.running():
        result = solve(operator, k=problem.k, seed=problem.seed)
    return meter.solved(result.eigenvalues, result.eigenvectors, "magnitude")


def pyhessian(problem: Problem, meter: Meter) -> Solved:
    """PyHessian's power iteration, its defaults (at most 100 products a pair, tol 1e-3 on the eigenvalue)."""
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise Absent(f"PyHessian is not installed ({error}); pip install pyhessian") from None
    torch.manual_seed(problem.seed)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of backward(create_graph=True)
        solver = hessian(
            problem.model,
            nn.CrossEntropyLoss(),
            dataloader=problem.batches,
            cuda=problem.device.type == "cuda",
        )
        solver.params = problem.parameters
        solver.dataloader_hv_product = meter.count(solver.dataloader_hv_product)
        with meter.running():
            values, vectors = solver.eigenvalues(top_n=problem.k)
    problem.model.zero_grad()
    flat = torch.stack([torch.cat([part.reshape(-1) for part in vector]) for vector in vectors])
    return meter.solved(torch.tensor(values), flat, "magnitude")


@dataclass(frozen=True)
class Solver:
    title: str
    solve: Callable[[Problem, Meter], Solved]
    packages: tuple[str, ...]
    slow: bool = False  # thousands of products: run once


SOLVERS: dict[str, Solver] = {
    "nostalgia": Solver("nostalgia lanczos", ours, ()),
    "curvlinops": Solver("curvlinops + scipy eigsh", curvlinops, ("curvlinops-for-pytorch", "scipy")),
    "eigsh": Solver("our operator + scipy eigsh", eigsh_on_ours, ("scipy",)),
    "eigenthings_lanczos": Solver("hessian-eigenthings lanczos", eigenthings_lanczos, ("hessian-eigenthings",)),
    "eigenthings_power": Solver(
        "hessian-eigenthings power iteration", eigenthings_power, ("hessian-eigenthings",), slow=True
    ),
    "pyhessian": Solver("PyHessian power iteration", pyhessian, ("pyhessian",), slow=True),
}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; raises Absent for a package that is not there."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise Absent(f"{package} is not installed; pip install {package}") from None
    return found
