"""What a run does with a finished task: its eigenpairs, into the method's memory and the run's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nostalgia.checkpoint.blocks import load_block, save_block
from nostalgia.checkpoint.store import BLOCKS
from nostalgia.curvature.density import estimate_spectrum
from nostalgia.curvature.eigenspace import task_operator, top_eigenpairs
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.stream import Batch, Prepared, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.experiment.prediction import ForgettingCheck, directions
from nostalgia.experiment.setup import Parts, curvature_options
from nostalgia.linalg.lanczos import Eigenpairs, LanczosProgress, LanczosState
from nostalgia.linalg.subspace import principal_angles
from nostalgia.models.backbones import projected_parameters
from nostalgia.parallel.accelerator import sharded_copy, strategy
from nostalgia.parallel.coordination import agree
from nostalgia.projection import MemoryUpdate
from nostalgia.reporting.files import write_json
from nostalgia.reporting.progress import Progress
from nostalgia.reporting.run_log import RunLog
from nostalgia.training.task_model import TaskModel, loss_sum


class CurvaturePhase:
    """The curvature of one task after the other; ``references`` are the files it wrote, with their checksums."""

    def __init__(self, parts: Parts, folder: Path, progress: Progress, log: RunLog) -> None:
        self.parts, self.folder, self.progress, self.log = parts, folder, progress, log
        self.config, self.accelerator = parts.config, parts.accelerator
        self.references: dict[str, str] = {}
        self.bases = SavedBases(parts, folder)
        self.forgetting = ForgettingCheck(parts, self.bases, folder) if ForgettingCheck.wanted(parts) else None
        self.solve: LanczosState | None = None  # of the eigensolve in progress
        self._memory_file = ""

    @property
    def wanted(self) -> bool:
        """Whether a finished task's curvature is taken: for the method's memory, or to predict forgetting."""
        return self.parts.method.needs_curvature or self.forgetting is not None

    def run(
        self, task: Task, images: Prepared, state: LanczosState | None, after_product: Callable[[int], None]
    ) -> tuple[Eigenpairs, MemoryUpdate | None]:
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
        update = self.parts.method.finish_task(task.index, pairs) if self.parts.method.needs_curvature else None
        if self.forgetting is not None:
            self.forgetting.task_finished(task, operator, pairs, self._warn)
            self._save_expansion(task)
        self._save(task, operator, pairs, update)
        self._save_memory(task)
        return pairs, update

    def state(self) -> dict[str, Any]:
        """What is small of all this, as plain JSON; the rest is in files that `references` lists."""
        memory = self.parts.memory
        return {
            "tasks": self.bases.count,
            "memory": {"file": self._memory_file, "tasks": memory.tasks, "eigenvalues": memory.eigenvalues.tolist()},
            "forgetting": None if self.forgetting is None else self.forgetting.prediction.state(),
        }

    def restore(self, saved: dict[str, Any], references: Mapping[str, str]) -> None:
        """Take up what `state` described, from the files that ``references`` lists."""
        memory, space = self.parts.memory, self.parts.space
        self.references, self.bases.count = dict(references), saved["tasks"]
        kept = saved["memory"]
        memory.tasks, self._memory_file = kept["tasks"], kept["file"]
        if self._memory_file:
            if self._memory_file not in references:
                raise ValueError("a memory's file that is not one of its own")
            values = torch.tensor(kept["eigenvalues"], dtype=torch.float64)
            memory.load(load_block(self.folder / self._memory_file, space), values, memory.tasks, space)
        if self.forgetting is not None and saved["forgetting"] is not None:
            vectors = {}
            for number in range(1, len(saved["forgetting"]["expansions"]) + 1):
                block = load_block(self._block_file(f"expansion{number}"), space)
                vectors.update({f"task{number}.parameters": block[0], f"task{number}.gradient": block[1]})
            self.forgetting.restore(vectors, saved["forgetting"])

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

    def _save(self, task: Task, operator: BatchedOperator, pairs: Eigenpairs, update: MemoryUpdate | None) -> None:
        memory = self.parts.memory
        angles = {
            name: principal_angles(basis, pairs.eigenvectors, pairs.space).tolist()
            for name, basis in self.bases.items()  # one at a time in memory
        }
        options, estimate = self.config.nostalgia, None
        if options.spectral_density:
            estimate = estimate_spectrum(operator, options.density_runs, options.density_steps)
        where_they_lie = directions(self.parts, pairs, self.forgetting, task.name)
        file = self.bases.file(task.index)
        self.references[self._name(file)] = save_block(file, pairs.eigenvectors, pairs.space)
        self.bases.count = task.index
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
                "memory_dropped": 0 if update is None else update.dropped,
                "memory_basis": memory.describe(),
                "principal_angles": angles,
                **where_they_lie,
                **({} if estimate is None else estimate.to_json()),
            },
        )

    def _save_expansion(self, task: Task) -> None:
        """The latest task's expansion, if it has one: two vectors, once a task."""
        assert self.forgetting is not None
        number, vectors = len(self.forgetting.prediction.expansions), self.forgetting.prediction.tensors()
        if task.name in self.forgetting.prediction.expansions:
            file = self._block_file(f"expansion{number}")
            block = torch.stack([vectors[f"task{number}.parameters"], vectors[f"task{number}.gradient"]])
            self.references[self._name(file)] = save_block(file, block, self.parts.space)

    def _save_memory(self, task: Task) -> None:
        """Once a task: later checkpoints refer to the file."""
        memory = self.parts.memory
        if memory.basis is None or memory.space is None:
            return
        file = self._block_file(f"memory_task{task.index}")
        self.references.pop(self._memory_file, None)
        self._memory_file = self._name(file)
        self.references[self._memory_file] = save_block(file, memory.basis, memory.space)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _block_file(self, name: str) -> Path:
        return self.folder / "checkpoints" / BLOCKS / f"{name}.safetensors"

    def _warn(self, line: str) -> None:
        self.progress.console.print(f"warning: {line}", highlight=False, markup=False)


class SavedBases(Mapping[str, torch.Tensor]):
    """Eigenvectors (k, P_local) of the first ``count`` tasks by name, read from their files when asked for.

    Collective: all ranks ask alike. Nothing is kept: a task's basis has the size of k networks.
    """

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.parts, self.folder, self.count = parts, folder, 0

    def file(self, index: int) -> Path:
        return self.folder / "curvature" / f"task{index}.safetensors"

    def __getitem__(self, name: str) -> torch.Tensor:
        index = next(task.index for task in self.parts.tasks if task.name == name)
        return load_block(self.file(index), self.parts.space).to(self.parts.space.dtype)

    def __iter__(self) -> Iterator[str]:
        return (task.name for task in self.parts.tasks[: self.count])

    def __len__(self) -> int:
        return self.count
