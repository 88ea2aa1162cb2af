"""What is measured beside a run at the end of each task: its curvature's files, and predicted forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nostalgia.curvature.density import estimate_spectrum
from nostalgia.curvature.eigenspace import gradient_rows, top_eigenpairs
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.curvature.rows import GradientRows, captured_energy, eigenpairs_of_rows
from nostalgia.curvature.shares import parameter_shares
from nostalgia.data.tasks import Task
from nostalgia.experiment.components import Components
from nostalgia.experiment.context import curvature_samples
from nostalgia.experiment.forgetting_observer import ForgettingObserver
from nostalgia.experiment.method_choice import curvature_options
from nostalgia.experiment.saved_curvature import SavedBlocks, SavedFactors
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.subspace import principal_angles
from nostalgia.logging.run_log import RunLog
from nostalgia.utils.files import write_json


class Analysis:
    """Writes ``curvature/task<i>.json`` and the eigenvectors beside it, and ``results/forgetting_prediction.json``.

    Training does not depend on any of it. The parameters and heads are those a task ended with, whole on every rank; all
    ranks call every method together.
    """

    def __init__(self, run: Components, folder: Path, log: RunLog, warn: Callable[[str], None]) -> None:
        self.run, self.log = run, log
        self.bases, self.factors = SavedBlocks(run, folder, run.space), SavedFactors(folder, run.space)
        self.forgetting = ForgettingObserver(run, folder, warn, self.bases, self.factors)
        self.predicts = run.config.analysis.predict_forgetting

    def task_ended(self, task: Task) -> Eigenpairs | None:
        """Record the task's curvature; returns its eigenpairs, None where the run has none."""
        pairs, factors = self.run.method.eigenpairs(), self.run.method.factors()
        if pairs is None and factors is None and self.predicts != "true":
            if self.forgetting.expansions:  # of a method that leaves the last task's curvature out
                self.forgetting.measure(task)
            return None
        operator = self.forgetting.losses.operator(task, self.run.config.curvature.hvp)
        if pairs is None and factors is None and not self.forgetting.losses.in_weights:
            pairs = self._own_pairs(task, operator)
        if factors is not None:
            self.factors.save(task, factors)
        if self.predicts != "false":
            self.forgetting.predict(task, operator, pairs, factors)
        if pairs is not None:
            self._record(task, operator, pairs)
        return pairs

    def state(self) -> dict[str, Any]:
        """For the checkpoint's codec."""
        return {
            "bases": self.bases.files,
            "factors": self.factors.files,
            "forgetting": self.forgetting.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.bases.files, self.factors.files = dict(state["bases"]), dict(state["factors"])
        self.forgetting.load_state(state["forgetting"])

    def _own_pairs(self, task: Task, operator: BatchedOperator) -> Eigenpairs:
        """Of a method that takes no curvature, by the solver that the run names."""
        options, k = curvature_options(self.run.config), self.run.config.analysis.top_k
        if options.takes_rows(self.run.space):
            rows = self._rows(task, options.num_samples, train=True)
            return eigenpairs_of_rows(rows, k, tol=options.tol, budget_bytes=options.rows_budget_bytes)
        return top_eigenpairs(operator, k, options)

    def _captured_energy(self, task: Task, pairs: Eigenpairs) -> float:
        """tr(Q^T G Q) / tr G over validation images of the task: samples that Q was not made of."""
        rows = self._rows(task, self.run.config.analysis.captured_energy_samples, train=False)
        return captured_energy(rows, pairs.eigenvectors, self.run.method.task.first_order_mask())

    def _rows(self, task: Task, num_samples: int, *, train: bool) -> GradientRows:
        run, model = self.run, self.forgetting.losses.model(task)
        batches = curvature_samples(run, [task], num_samples, train=train)
        options, parameters = curvature_options(run.config), run.scope_parameters()
        return gradient_rows(model, run.objective, batches, parameters, run.accelerator, options, run.space)

    def _record(self, task: Task, operator: BatchedOperator, pairs: Eigenpairs) -> None:
        run, options = self.run, self.run.config.analysis
        angles = {
            name: principal_angles(basis, pairs.eigenvectors, pairs.space).tolist()
            for name, basis in self.bases.items()  # one at a time in memory
        }
        spectrum = {}
        if options.spectral_density:
            seed = run.config.experiment.seed
            spectrum = estimate_spectrum(operator, options.density_runs, options.density_steps, seed).to_json()
        energy = {}
        if run.config.curvature.kind == "ggn" and options.captured_energy_samples:
            energy = {"captured_energy": self._captured_energy(task, pairs)}
        expansion = None if self.forgetting.losses.in_weights else self.forgetting.expansions.get(task.name)
        trace = {} if expansion is None else {"trace": expansion.trace, "trace_error": expansion.rest_error}
        importance = parameter_shares(pairs.eigenvectors, pairs.eigenvalues, pairs.space)
        report = run.method.report()
        self.bases[task.name] = pairs.eigenvectors
        self.log.curvature(
            task.name,
            pairs.eigenvalues.tolist(),
            residuals=pairs.residuals.tolist(),
            products=pairs.products,
            seconds=pairs.seconds,
            memory_columns=report.get("memory_basis", {}).get("columns"),
        )
        if not run.accelerator.is_main_process:
            return
        write_json(
            self.bases.path(task.name).with_suffix(".json"),
            {
                "task": task.name,
                "eigenvalues": pairs.eigenvalues.tolist(),
                "residuals": pairs.residuals.tolist(),
                "converged": pairs.converged.tolist(),
                "tol": pairs.tol,
                "products": pairs.products,
                "collectives": pairs.collectives,
                "bytes_moved": pairs.bytes_moved,
                "seconds": pairs.seconds,
                "curvature": run.config.curvature.kind,
                "solver": "rows" if curvature_options(run.config).takes_rows(run.space) else "lanczos",
                **energy,
                "principal_angles": angles,
                "parameters": list(pairs.space.names),
                "parameter_sizes": list(pairs.space.layout.numels),
                "importance": importance,
                **report,
                **trace,
                **spectrum,
            },
        )
