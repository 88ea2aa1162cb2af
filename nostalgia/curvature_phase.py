"""What a run does with a finished task: its eigenpairs, into the method's memory and the run's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nostalgia.checkpoint.blocks import load_block, save_block
from nostalgia.checkpoint.store import BLOCKS
from nostalgia.curvature.eigenspace import task_operator, top_eigenpairs
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.stream import Batch, Prepared, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.linalg.backend import SpaceBackend
from nostalgia.linalg.lanczos import Eigenpairs, LanczosProgress, LanczosState
from nostalgia.linalg.subspace import principal_angles
from nostalgia.models.backbones import projected_parameters
from nostalgia.parallel.accelerator import sharded_copy, strategy
from nostalgia.parallel.coordination import agree
from nostalgia.projection import MemoryUpdate
from nostalgia.reporting.files import write_json
from nostalgia.reporting.progress import Progress
from nostalgia.reporting.run_log import RunLog
from nostalgia.setup import Parts, curvature_options
from nostalgia.training.task_model import TaskModel, loss_sum


class CurvaturePhase:
    """The curvature of one task after the other; ``references`` are the files it wrote, with their checksums."""

    def __init__(self, parts: Parts, folder: Path, progress: Progress, log: RunLog) -> None:
        self.parts, self.folder, self.progress, self.log = parts, folder, progress, log
        self.config, self.accelerator = parts.config, parts.accelerator
        self.references: dict[str, str] = {}
        self.solve: LanczosState | None = None  # of the eigensolve in progress
        self._memory_file = ""

    def run(
        self, task: Task, images: Prepared, state: LanczosState | None, after_product: Callable[[int], None]
    ) -> tuple[Eigenpairs, MemoryUpdate]:
        """Solve, or go on from ``state``; raises RunFailedError where no pair converged."""
        options = curvature_options(self.config)
        operator = self._operator(self._batches(task, images), options)
        with self.progress.eigensolve(options.top_k) as display:

            def follow(progress: LanczosProgress) -> None:
                display.products(progress.products, progress.converged)
                self.solve = progress.state
                after_product(progress.products)

            pairs = top_eigenpairs(operator, options, follow, state)
        self.solve = None
        if not bool(pairs.converged.any()):
            raise RunFailedError(
                f"{task.name}: none of {options.top_k} eigenpairs converged in {pairs.products} products "
                f"(worst residual {float(pairs.residuals.max()):.2g}); raise nostalgia.max_products or "
                "nostalgia.tol, or use nostalgia.precision=float64"
            )
        update = self.parts.method.finish_task(task.index, pairs)
        self._save(task, operator, pairs, update)
        self._save_memory(task)
        return pairs, update

    def saved_memory(self) -> dict[str, Any]:
        """Where the memory's basis is kept, and what is small of it, as plain JSON."""
        memory = self.parts.memory
        return {"file": self._memory_file, "tasks": memory.tasks, "eigenvalues": memory.eigenvalues.tolist()}

    def load_memory(self, saved: dict[str, Any]) -> None:
        """Take up the memory that `saved_memory` described."""
        memory, space = self.parts.memory, self.parts.space
        memory.tasks, self._memory_file = saved["tasks"], saved["file"]
        if self._memory_file:
            values = torch.tensor(saved["eigenvalues"], dtype=torch.float64)
            memory.load(load_block(self.folder / self._memory_file, space), values, memory.tasks, space)

    def _batches(self, task: Task, images: Prepared) -> list[Batch]:
        return agree(
            self.accelerator,
            lambda: curvature_batches(
                images,
                self.parts.view,
                name=task.name,
                num_samples=self.config.nostalgia.num_samples,
                batch_size=self.config.nostalgia.batch_size,
                seed=self.config.experiment.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            ),
        )

    def _operator(self, batches: list[Batch], options: Any) -> BatchedOperator:
        parts, smoothing = self.parts, self.config.train.label_smoothing

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
            return loss_sum(model(batch.images), batch, smoothing), len(batch)

        model: nn.Module = TaskModel(parts.backbone, [parts.heads[-1]])
        if options.method == "finite_difference" and strategy(self.accelerator) == "fsdp2":
            # Two ordinary gradients of the sharded model: nothing is gathered.
            model = sharded_copy(self.accelerator, model)
        available = projected_parameters(model.backbone, self.config.nostalgia.project_params)  # type: ignore[arg-type]
        parameters = {name: available[name] for name in parts.projected}
        return task_operator(model, loss_fn, batches, parameters, self.accelerator, options, parts.space)

    def _save(self, task: Task, operator: BatchedOperator, pairs: Eigenpairs, update: MemoryUpdate) -> None:
        memory = self.parts.memory
        angles = self._angles(task, pairs)
        density = self._density(operator) if self.config.nostalgia.spectral_density else None
        file = self._basis_file(task.index)
        self.references[self._name(file)] = save_block(file, pairs.eigenvectors, pairs.space)
        self.log.curvature(
            task.name,
            pairs.eigenvalues.tolist(),
            residuals=pairs.residuals.tolist(),
            products=pairs.products,
            seconds=pairs.seconds,
            memory_columns=memory.columns,
        )
        if not self.accelerator.is_main_process:
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
                "curvature": self.config.nostalgia.curvature,
                "memory_eigenvalues": memory.eigenvalues.tolist(),
                "memory_dropped": update.dropped,
                "memory_basis": memory.describe(),
                "principal_angles": angles,
                **({"density": density} if density else {}),
            },
        )

    def _save_memory(self, task: Task) -> None:
        """Once a task: later checkpoints refer to the file."""
        memory = self.parts.memory
        if memory.basis is None or memory.space is None:
            return
        file = self.folder / "checkpoints" / BLOCKS / f"memory_task{task.index}.safetensors"
        self.references.pop(self._memory_file, None)
        self._memory_file = self._name(file)
        self.references[self._memory_file] = save_block(file, memory.basis, memory.space)

    def _angles(self, task: Task, pairs: Eigenpairs) -> dict[str, list[float]]:
        """Principal angles to each earlier task's eigenspace, read back one at a time: none is kept in memory."""
        earlier = self.parts.tasks[: task.index - 1]
        return {
            other.name: principal_angles(
                load_block(self._basis_file(other.index), pairs.space).to(pairs.space.dtype),
                pairs.eigenvectors,
                pairs.space,
            ).tolist()
            for other in earlier
        }

    def _density(self, operator: BatchedOperator) -> dict[str, list[float]]:
        """Density of the whole spectrum, by stochastic Lanczos quadrature (hessian-eigenthings, on our operator)."""
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        steps = min(40, operator.size)
        result = spectral_density(
            operator,
            num_runs=4,
            lanczos_steps=steps,
            num_grid_points=1000,
            seed=0,
            backend=SpaceBackend(operator.space),
        )
        return {"grid": result.grid.tolist(), "density": result.density.tolist()}

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _basis_file(self, index: int) -> Path:
        return self.folder / "curvature" / f"task{index}.safetensors"
