"""What is measured beside a run at the end of each task: its curvature's files, and predicted forgetting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nostalgia.checkpoint.blocks import load_block, save_block
from nostalgia.checkpoint.codec import SavedFile
from nostalgia.curvature.density import estimate_spectrum
from nostalgia.curvature.eigenspace import gradient_rows, task_operator, top_eigenpairs
from nostalgia.curvature.forgetting import ForgettingPrediction
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.curvature.rows import captured_energy
from nostalgia.curvature.shares import parameter_shares
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.experiment.components import Components, curvature_options
from nostalgia.experiment.context import curvature_samples
from nostalgia.experiment.saved_factors import SavedFactors
from nostalgia.linalg.block import Block
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.subspace import principal_angles
from nostalgia.models import norm_statistics
from nostalgia.models.heads import copy_head, head_with
from nostalgia.models.task_model import TaskModel
from nostalgia.reporting.files import write_json
from nostalgia.reporting.run_folder import FORGETTING
from nostalgia.reporting.run_log import RunLog


class Analysis:
    """Writes ``curvature/task<i>.json`` and the eigenvectors beside it, and ``results/forgetting_prediction.json``.

    Training does not depend on any of it. The parameters and heads are those a task ended with, whole on every rank; all
    ranks call every method together.
    """

    def __init__(self, run: Components, folder: Path, log: RunLog, warn: Callable[[str], None]) -> None:
        self.run, self.folder, self.log, self.warn = run, folder, log, warn
        self.bases, self.factors = SavedBases(run, folder), SavedFactors(run, folder)
        options = run.config.analysis
        self.prediction = ForgettingPrediction(
            run.space, self.bases, self.factors, trace_samples=options.trace_samples, seed=run.config.experiment.seed
        )
        # Merged adapters begin anew: their parameters no longer say how far the network has moved.
        merged = run.method.restarts_adapters or run.config.model.lora.merge == "task"
        self.predicts = "false" if merged else options.predict_forgetting
        self._heads: dict[str, dict[str, Tensor]] = {}  # of each task, as it ended

    def task_ended(self, task: Task) -> Eigenpairs | None:
        """Record the task's curvature; returns its eigenpairs, None where the run has none."""
        pairs, factors = self.run.method.eigenpairs(), self.run.method.factors()
        if pairs is None and factors is None and self.predicts != "true":
            if self.prediction.expansions:  # of a method that leaves the last task's curvature out
                self._measure(task)
            return None
        operator = self._operator(task, self.run.config.curvature.hvp)
        if pairs is None and factors is None:
            pairs = top_eigenpairs(operator, self.run.config.analysis.top_k, curvature_options(self.run.config))
        if factors is not None:
            self.factors.save(task, factors)
        if self.predicts != "false":
            self._predict(task, operator, pairs)
        if pairs is not None:
            self._record(task, operator, pairs)
        return pairs

    def state(self) -> dict[str, Any]:
        """For the checkpoint's codec."""
        return {
            "bases": self.bases.files,
            "factors": self.factors.files,
            "prediction": self.prediction.state(),
            "vectors": {task: Block(rows, self.run.space) for task, rows in self.prediction.vectors.items()},
            "heads": self._heads,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.bases.files, self.factors.files = dict(state["bases"]), dict(state["factors"])
        self._heads = {name: dict(head) for name, head in state["heads"].items()}
        self.prediction.load_state(state["prediction"], {task: block.rows for task, block in state["vectors"].items()})

    def _measure(self, task: Task) -> None:
        """Measure the earlier tasks against their predictions."""
        run = self.run
        by_name = {t.name: t for t in run.tasks}
        theta = run.space.take(p.detach() for p in run.scope_parameters().values())
        self.prediction.measure(task.name, theta, lambda name: self._loss(by_name[name]))
        if run.accelerator.is_main_process:
            write_json(self.folder / "results" / FORGETTING, self.prediction.report())

    def _predict(self, task: Task, operator: BatchedOperator, pairs: Eigenpairs | None) -> None:
        """Measure the earlier tasks against their predictions, and expand this one's loss."""
        run = self.run
        self._heads[task.name] = copy_head(run.heads[task.head])
        self._measure(task)
        try:
            self.prediction.finish(task.name, operator, pairs, self._loss(task))
        except RunFailedError as error:  # raised on every rank alike; training does not depend on it
            self.warn(f"{task.name}: its forgetting will not be predicted: {error}")
        if run.accelerator.is_main_process:
            write_json(self.folder / "results" / FORGETTING, self.prediction.report())

    def _loss(self, task: Task) -> float:
        """Mean loss of a finished task over its curvature set, at the parameters as they are now.

        Under its own head as the task ended, and, as in evaluation, its own batch-norm statistics.
        """
        run = self.run
        own = run.norm_statistics[task.index - 1] if run.config.model.norm_statistics == "per_task" else None
        with norm_statistics.using(run.backbone, own):
            # The parameters are whole here: a loss takes one plain pass, whatever way products are taken.
            return self._operator(task, "exact").loss()

    def _operator(self, task: Task, hvp: str) -> BatchedOperator:
        run = self.run
        options = curvature_options(run.config)
        if hvp != options.hvp:
            options = dataclasses.replace(options, hvp=hvp, compile=False)
        head = run.heads[task.head]
        if task.name in self._heads:
            head = head_with(self._heads[task.name])
        return task_operator(
            TaskModel(run.backbone, [head]),
            run.objective,
            curvature_samples(run, [task], options.num_samples),
            run.scope_parameters(),
            run.accelerator,
            options,
            run.space,
        )

    def _captured_energy(self, task: Task, pairs: Eigenpairs) -> float:
        """tr(Q^T G Q) / tr G over validation images of the task: samples that Q was not made of."""
        run, options = self.run, curvature_options(self.run.config)
        batches = curvature_samples(run, [task], self.run.config.analysis.captured_energy_samples, train=False)
        head = head_with(self._heads[task.name]) if task.name in self._heads else run.heads[task.head]
        model = TaskModel(run.backbone, [head])
        rows = gradient_rows(model, run.objective, batches, run.scope_parameters(), run.accelerator, options, run.space)
        return captured_energy(rows, pairs.eigenvectors)

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
        expansion = self.prediction.expansions.get(task.name)
        trace = {} if expansion is None else {"trace": expansion.trace, "trace_error": expansion.rest_error}
        importance = parameter_shares(pairs.eigenvectors, pairs.eigenvalues, pairs.space)
        report = run.method.report()
        file = self.bases.save(task, pairs)
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
            file.with_suffix(".json"),
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
                "solver": run.config.curvature.solver,
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


class SavedBases(Mapping[str, Tensor]):
    """Eigenvectors (k, P_local) of finished tasks by name, read from their files when asked for.

    Collective: all ranks ask alike. Nothing is kept: a task's basis has the size of k networks.
    """

    def __init__(self, run: Components, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.files: dict[str, SavedFile] = {}

    def save(self, task: Task, pairs: Eigenpairs) -> Path:
        name = f"curvature/task{task.index}.safetensors"
        self.files[task.name] = SavedFile(name, save_block(self.folder / name, pairs.eigenvectors, pairs.space))
        return self.folder / name

    def __getitem__(self, name: str) -> Tensor:
        return load_block(self.folder / self.files[name].name, self.run.space).to(self.run.space.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
