"""What a finished task's top eigenspace costs and captures: by rows and by Lanczos, over more and more samples.

python -m nostalgia.train method=bench.eigenspaces:Eigenspaces ... curvature.num_samples=2048     any run on one process

Training is plain fine-tuning. When the first task ends, the last method.held_out of its curvature samples are put aside, and
the top method.k eigenpairs are taken over the first 256, 512, ... of the others: from rows, and by Lanczos of the
Gauss-Newton matrix and of the Hessian to curvature.tol. Written (method.out) for each: processor seconds, products, their
ratio to a training epoch over the same samples (forward and backward passes alone), and the captured energy
tr(Q^T G Q) / tr G over those held out. Kronecker factors are timed beside them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nostalgia.curvature.eigenspace import gradient_rows, task_operator, top_eigenpairs
from nostalgia.curvature.kronecker import kronecker_factors
from nostalgia.curvature.rows import captured_energy, eigenpairs_of_rows
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.methods.base import Method, TaskContext
from nostalgia.options import option

FIRST = 256
ENERGY_DRAWS = 8  # of a held-out sample: all outputs where there are no more


@dataclass(frozen=True)
class EigenspacesConfig:
    out: str = option("eigenspaces.json", "File to write.")
    k: int = option(32, "Eigenpairs.", low=1)
    held_out: int = option(256, "Samples that no eigenspace is taken over.", low=1)
    lanczos_up_to: int = option(10**9, "Samples up to which Lanczos runs: its cost grows with them.", low=0)


class Eigenspaces(Method):
    """Plain fine-tuning that measures eigensolvers when its first task ends; one process."""

    name = "eigenspaces"
    Config = EigenspacesConfig

    def end_task(self, task: TaskContext) -> None:
        if task.index > 1:
            return
        config, size = self.config, task.curvature.batch_size
        batches = task.samples(task.curvature.num_samples, size)
        aside = -(-config.held_out // size)
        batches, held_out = batches[:-aside], batches[-aside:]
        found, count = [], FIRST
        while True:
            some = batches[: count // size]
            found += measured(task, some, held_out, config, lanczos=count <= config.lanczos_up_to)
            Path(config.out).write_text(json.dumps({"parameters": task.space.size, "rows": found}, indent=1) + "\n")
            if len(some) == len(batches):
                return
            count *= 2


def measured(
    task: TaskContext, batches: Sequence[Any], held_out: Sequence[Any], config: EigenspacesConfig, *, lanczos: bool
) -> list[dict[str, Any]]:
    """A row for each way to the eigenspace of ``batches``."""
    common = (task.parameters, task.accelerator)

    def by_rows() -> Eigenpairs:
        rows = gradient_rows(task.model, task.objective, batches, *common, task.curvature, task.space)
        return eigenpairs_of_rows(rows, config.k, budget_bytes=task.curvature.rows_budget_bytes)

    def by_lanczos(kind: str) -> Callable[[], Eigenpairs]:
        options = dataclasses.replace(task.curvature, kind=kind)
        return lambda: top_eigenpairs(
            task_operator(task.model, task.objective, batches, *common, options, task.space), config.k, options
        )

    ways = {"rows": by_rows}
    if lanczos:
        ways |= {"lanczos, ggn": by_lanczos("ggn"), "lanczos, hessian": by_lanczos("hessian")}
    samples = sum(len(batch) for batch in batches)
    epoch, _ = timed(lambda: an_epoch(task, batches))
    factors, _ = timed(
        lambda: kronecker_factors(task.model, task.objective.forward_fn, batches, *common, draws=4, temperature=4.0)
    )
    made = [{"samples": samples, "by": "Kronecker factors", "seconds": factors, "epochs": factors / epoch}]
    for name, solve in ways.items():
        seconds, pairs = timed(solve)
        options = dataclasses.replace(task.curvature, rows_per_sample=ENERGY_DRAWS)
        rows = gradient_rows(task.model, task.objective, held_out, *common, options, task.space)
        made.append(
            {
                "samples": samples,
                "by": name,
                "seconds": seconds,
                "epochs": seconds / epoch,
                "products": pairs.products,
                "converged": int(pairs.converged.sum()),
                "captured_energy": captured_energy(rows, pairs.eigenvectors),
            }
        )
    return made


def an_epoch(task: TaskContext, batches: Sequence[Any]) -> None:
    """Forward and backward passes of training over ``batches``."""
    task.model.train()
    for batch in batches:
        task.model.zero_grad(set_to_none=True)
        with task.accelerator.autocast():
            loss = task.objective(task.model, batch).loss
        task.accelerator.backward(loss)
    task.model.zero_grad(set_to_none=True)
    task.model.eval()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, or those of the device, and the result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        return time.perf_counter() - started, result
    started = time.process_time()
    result = work()
    return time.process_time() - started, result
