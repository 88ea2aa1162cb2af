"""A run: the only place where data, models, training, curvature and reporting meet."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from nostalgia.config import Request
from nostalgia.curvature.eigenspace import task_operator, top_eigenpairs
from nostalgia.curvature.operators import BatchedOperator
from nostalgia.data.stream import Batch, Prepared, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.errors import RunFailedError
from nostalgia.evaluation.accuracy import Score, evaluate
from nostalgia.linalg.backend import SpaceBackend
from nostalgia.linalg.lanczos import Eigenpairs, LanczosProgress
from nostalgia.linalg.subspace import principal_angles
from nostalgia.methods import StepRule
from nostalgia.methods.finetune import PlainStep
from nostalgia.models import make_head, norm_statistics
from nostalgia.models.backbones import projected_parameters
from nostalgia.observer import PhaseObserver
from nostalgia.parallel.accelerator import strategy, wrap_by_layer
from nostalgia.parallel.coordination import agree
from nostalgia.parallel.guard import check_consistency
from nostalgia.prediction import ForgettingCheck, directions
from nostalgia.projection import MemoryUpdate
from nostalgia.reporting.console import RunInfo, TaskInfo, TaskOutcome, print_config, print_final, start_panel, task_row
from nostalgia.reporting.drawing import draw_run
from nostalgia.reporting.files import write_json
from nostalgia.reporting.progress import Progress
from nostalgia.reporting.report import write_report
from nostalgia.reporting.results import RunResults, write_results
from nostalgia.reporting.run_folder import read_run
from nostalgia.reporting.run_log import RunLog
from nostalgia.reporting.streams import make_console
from nostalgia.setup import (
    Parts,
    build_parts,
    curvature_options,
    make_run_folder,
    optimization,
    versions,
)
from nostalgia.training.loop import Phase, run_phase
from nostalgia.training.task_model import TaskModel, loss_sum


def run(request: Request, accelerator: Accelerator, precision: str) -> Path | None:
    """Run what the command line asks for; returns the run's folder (None for a dry run)."""
    config = request.config
    set_seed(config.experiment.seed, device_specific=True, deterministic=config.experiment.deterministic)
    if config.train.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
    folder = None if request.dry_run else make_run_folder(config, accelerator)
    parts = build_parts(config, accelerator, precision)
    console = make_console(quiet=not accelerator.is_main_process)
    print_config(
        console,
        OmegaConf.to_container(OmegaConf.structured(config), resolve=True),  # type: ignore[arg-type]
        quiet=request.quiet,
        path=None if folder is None else folder / "config.yaml",
    )
    console.print(start_panel(run_info(parts, request, folder or Path(config.experiment.output_dir))))
    if folder is None:
        return None
    with Progress(accelerator.is_main_process, len(parts.tasks), console=console) as progress:
        experiment = Experiment(parts, request, folder, progress)
        experiment.console = console
        results = experiment.run()
    if accelerator.is_main_process:
        paths = write_results(folder / "results", results)
        drawn = draw_run(read_run(folder), folder / "results" / "figures")
        experiment.log.figures(drawn.made)
        paths |= {"figures": folder / "results" / "figures", "report": write_report([folder])}
        print_final(console, results, paths)
        for name, why in drawn.skipped.items():
            console.print(f"figure {name} not drawn: {why}", highlight=False)
    experiment.log.finish(results)
    accelerator.wait_for_everyone()
    return folder


class Experiment:
    """The tasks of a run, one after the other."""

    def __init__(self, parts: Parts, request: Request, folder: Path, progress: Progress) -> None:
        self.parts, self.folder, self.progress = parts, folder, progress
        self.config, self.accelerator = parts.config, parts.accelerator
        self.console = progress.console
        logger = self.config.logger
        self.log = RunLog(
            folder,
            self.accelerator,
            tensorboard=logger.tensorboard,
            wandb=None
            if not logger.use_wandb
            else {
                "project": logger.project,
                "entity": logger.entity,
                "name": logger.name,
                "group": logger.group,
                "tags": logger.tags,
                "mode": logger.mode,
            },
            save_dir=None if logger.save_dir is None else Path(logger.save_dir),
            config=OmegaConf.to_container(OmegaConf.structured(self.config), resolve=True),  # type: ignore[arg-type]
            warn=lambda line: self.console.print(f"warning: {line}", highlight=False),
        )
        self.step = 0
        self.matrix: list[list[float | None]] = []
        self.before: list[float | None] = []
        self.baseline: list[float | None] = []
        self.seconds: list[float] = []
        self.bases: dict[str, Any] = {}  # earlier tasks' eigenspaces, for the angles between them
        self.forgetting = ForgettingCheck(parts, self.bases, folder) if ForgettingCheck.wanted(parts) else None
        self.initial = {k: v.detach().cpu().clone() for k, v in parts.backbone.state_dict().items()}
        # Evaluation images are few and read again after every task: their loaders are made once.
        self.val_loaders = [parts.loader([task], train=False) for task in parts.tasks]

    def run(self) -> RunResults:
        started = time.perf_counter()
        if self.parts.method.joint:
            self._joint()
        else:
            for task in self.parts.tasks:
                with self.progress.task(task.index, task.name):
                    self._task(task)
        warm = self.config.train.head_warmup_epochs > 0 and not self.parts.method.joint
        return RunResults.of(
            tasks=[t.name for t in self.parts.tasks],
            classes=[t.classes for t in self.parts.tasks],
            accuracy_matrix=self.matrix,
            before_accuracies=self.before if warm else None,
            baseline_accuracies=self.baseline if warm else None,
            method=self.parts.method.name,
            seed=self.config.experiment.seed,
            world_size=self.accelerator.num_processes,
            seconds=time.perf_counter() - started,
            versions=versions(),
            details={
                "model": self.config.model.name,
                "seconds_per_task": self.seconds,
                "device": device_name(self.accelerator),
                "strategy": strategy(self.accelerator),
                "precision": self.parts.precision,
            },
        )

    # -- one task --------------------------------------------------------------------------------------------------

    def _task(self, task: Task) -> None:
        started, parts = time.perf_counter(), self.parts
        loader = parts.loader([task], train=True)
        head = self._new_head(task)
        warmup = self.config.train.head_warmup_epochs
        if warmup:
            head = self._warm_up(task, loader, head)
        observer = self._observer(task, loader)
        model = self._phase([head], loader, self.parts.epochs(task), observer)
        self.step += observer.steps
        parts.backbone, head = model.backbone, model.heads[0]  # type: ignore[assignment]
        norm_statistics.average_over_ranks(parts.backbone)
        parts.heads.append(head)
        parts.norm_statistics.append(norm_statistics.capture(parts.backbone))
        scores = self._evaluate_seen()
        self.matrix.append([s.accuracy for s in scores] + [None] * (len(parts.tasks) - len(scores)))
        wanted = parts.method.needs_curvature or self.forgetting is not None
        pairs, update = self._curvature(task, loader.images) if wanted else (None, None)
        self.seconds.append(time.perf_counter() - started)
        self._report(task, pairs, update, observer.leak)

    def _new_head(self, task: Task) -> nn.Module:
        seed = self.config.experiment.seed * 1000 + task.index
        head = make_head(self.parts.backbone.feature_dim, len(task.classes), seed)
        return head.to(device=self.accelerator.device, dtype=self.parts.view.dtype)

    def _warm_up(self, task: Task, loader: Any, head: nn.Module) -> nn.Module:
        """Fit the head alone; measure what it gives on this backbone and on the one the run began with."""
        for name, accuracies in (("baseline", self.baseline), ("before", self.before)):
            if name == "baseline" and task.index == 1:
                accuracies.append(None)  # the first task's counts nowhere
                continue
            backbone = self.parts.backbone
            fresh = copy.deepcopy(head)
            if name == "baseline":
                backbone = copy.deepcopy(backbone)
                backbone.load_state_dict(self.initial)
            observer = self._observer(task, None, label="warmup")
            observer.record = name == "before"
            backbone.set_trainable(False)
            epochs = self.config.train.head_warmup_epochs
            model = self._phase([fresh], loader, epochs, observer, backbone=backbone, head_only=True)
            model.backbone.set_trainable(True)  # type: ignore[operator]
            score = self._score(model.backbone, model.heads[0], task)
            accuracies.append(score.accuracy)
            if name == "before":
                self.step += observer.steps
                self.parts.backbone = model.backbone  # type: ignore[assignment]
                self.log.evaluation(
                    step=self.step, tasks=[task.name], accuracies=[score.accuracy], losses=[score.loss], split="before"
                )
        return model.heads[0]

    def _phase(
        self,
        heads: list[nn.Module],
        loader: Any,
        epochs: int,
        observer: PhaseObserver,
        *,
        backbone: nn.Module | None = None,
        head_only: bool = False,
    ) -> TaskModel:
        """Train heads, with the backbone unless ``head_only``; returns them, unwrapped."""
        parts, config = self.parts, self.config
        index = len(parts.heads) + 1
        model = TaskModel(backbone if backbone is not None else parts.backbone, heads)
        wrap_by_layer(self.accelerator, model.backbone)
        phase = Phase(
            accelerator=self.accelerator,
            optimization=optimization(config, epochs, head_only=head_only),
            observer=observer,
            rule=(lambda _: PlainStep()) if head_only else (lambda p: self._step_rule(index, p)),
            projected=() if head_only else parts.projected,
            log_every=config.train.log_every_n_steps,
            max_steps_per_epoch=config.train.max_steps_per_epoch,
            frozen_backbone=head_only,
            guard=self._guard,
            guard_every=config.nostalgia.guard_every_n_steps,
            where=observer.task,
        )
        return run_phase(model, loader, phase)

    def _step_rule(self, index: int, parameters: Any) -> StepRule:
        return self.parts.method.step_rule(index, parameters)

    def _guard(self, parameters: dict[str, torch.Tensor], where: str) -> None:
        memory = self.parts.memory
        tensors = dict(parameters)
        if memory.basis is not None and memory.space is not None and memory.space.placement == "local":
            tensors["the memory's basis"] = memory.basis
        check_consistency(tensors, where)

    def _observer(self, task: Task, loader: Any, label: str = "train") -> PhaseObserver:
        limit = self.config.train.max_eval_batches
        val = self.val_loaders[task.index - 1]
        validate = None if label == "warmup" else lambda model: evaluate(model, val, self.accelerator, limit)
        return PhaseObserver(self.progress, self.log, task.name, self.step, label, validate)

    def _score(self, backbone: nn.Module, head: nn.Module, task: Task) -> Score:
        limit = self.config.train.max_eval_batches
        return evaluate(TaskModel(backbone, [head]), self.val_loaders[task.index - 1], self.accelerator, limit)

    def _evaluate_seen(self) -> list[Score]:
        """Each task seen, under its own head and, by choice, its own batch-norm statistics."""
        parts = self.parts
        own = self.config.model.norm_statistics == "per_task"
        scores = []
        for task, head, statistics in zip(parts.tasks, parts.heads, parts.norm_statistics, strict=False):
            with norm_statistics.using(parts.backbone, statistics if own else None):
                scores.append(self._score(parts.backbone, head, task))
        self.log.evaluation(
            step=self.step,
            tasks=[t.name for t in parts.tasks[: len(scores)]],
            accuracies=[s.accuracy for s in scores],
            losses=[s.loss for s in scores],
        )
        return scores

    # -- curvature -------------------------------------------------------------------------------------------------

    def _curvature(self, task: Task, images: Prepared) -> tuple[Eigenpairs, MemoryUpdate | None]:
        """The finished task's eigenpairs into the method's memory and the run's files."""
        parts, options = self.parts, curvature_options(self.config)
        batches = agree(
            self.accelerator,
            lambda: curvature_batches(
                images,
                parts.view,
                name=task.name,
                num_samples=self.config.nostalgia.num_samples,
                batch_size=self.config.nostalgia.batch_size,
                seed=self.config.experiment.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            ),
        )
        operator = self._operator(batches, options)
        with self.progress.eigensolve(options.top_k) as display:

            def show(progress: LanczosProgress) -> None:
                display.products(progress.products, progress.converged)

            pairs = top_eigenpairs(operator, options, show)
        if not bool(pairs.converged.any()):
            raise RunFailedError(
                f"{task.name}: none of {options.top_k} eigenpairs converged in {pairs.products} products "
                f"(worst residual {float(pairs.residuals.max()):.2g}); raise nostalgia.max_products or "
                "nostalgia.tol, or use nostalgia.precision=float64"
            )
        update = parts.method.finish_task(task.index, pairs) if parts.method.needs_curvature else None
        if self.forgetting is not None:
            self.forgetting.task_finished(task, operator, pairs, self._warn)
        self._save_curvature(task, operator, pairs, update)
        return pairs, update

    def _operator(self, batches: list[Batch], options: Any) -> BatchedOperator:
        parts, smoothing = self.parts, self.config.train.label_smoothing

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
            return loss_sum(model(batch.images), batch, smoothing), len(batch)

        model: nn.Module = TaskModel(parts.backbone, [parts.heads[-1]])
        if options.method == "finite_difference" and strategy(self.accelerator) == "fsdp2":
            # Two ordinary gradients of the sharded model: nothing is gathered.
            wrap_by_layer(self.accelerator, parts.backbone)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            model, _ = self.accelerator.prepare(copy.deepcopy(model), optimizer)
        available = projected_parameters(model.backbone, self.config.nostalgia.project_params)  # type: ignore[arg-type]
        parameters = {name: available[name] for name in parts.projected}
        return task_operator(model, loss_fn, batches, parameters, self.accelerator, options, parts.space)

    def _warn(self, line: str) -> None:
        self.console.print(f"warning: {line}", highlight=False)

    def _save_curvature(
        self, task: Task, operator: BatchedOperator, pairs: Eigenpairs, update: MemoryUpdate | None
    ) -> None:
        memory, space = self.parts.memory, pairs.space
        angles = {
            name: principal_angles(basis, pairs.eigenvectors, space).tolist() for name, basis in self.bases.items()
        }
        self.bases[task.name] = pairs.eigenvectors
        density = self._density(operator) if self.config.nostalgia.spectral_density else None
        basis = space.gather_flat(pairs.eigenvectors)
        self.log.curvature(
            task.name,
            pairs.eigenvalues.tolist(),
            residuals=pairs.residuals.tolist(),
            products=pairs.products,
            seconds=pairs.seconds,
            memory_columns=memory.columns,
        )
        where_they_lie = directions(self.parts, pairs, self.forgetting, task.name)
        if not self.accelerator.is_main_process:
            return
        where = self.folder / "curvature"
        where.mkdir(exist_ok=True)
        _save_basis(basis, where / f"task{task.index}.safetensors")
        write_json(
            where / f"task{task.index}.json",
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
                "principal_angles": angles,
                **where_they_lie,
                **({"density": density} if density else {}),
            },
        )

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

    # -- the rest --------------------------------------------------------------------------------------------------

    def _joint(self) -> None:
        """All tasks' data together, one head each: fills the last row of the matrix only."""
        parts = self.parts
        loader = parts.loader(parts.tasks, train=True, name="joint")
        heads = [self._new_head(task) for task in parts.tasks]
        observer = PhaseObserver(self.progress, self.log, "joint", 0)
        with self.progress.task(1, "joint"):
            model = self._phase(heads, loader, self.config.train.epochs, observer)
        self.step = observer.steps
        parts.backbone, parts.heads = model.backbone, list(model.heads)  # type: ignore[assignment]
        norm_statistics.average_over_ranks(parts.backbone)
        parts.norm_statistics = [norm_statistics.capture(parts.backbone)] * len(parts.tasks)
        count = len(parts.tasks)
        row: list[float | None] = [s.accuracy for s in self._evaluate_seen()]
        self.matrix = [[None] * count for _ in range(count - 1)] + [row]

    def _report(self, task: Task, pairs: Eigenpairs | None, update: MemoryUpdate | None, leak: float | None) -> None:
        if pairs is not None and update is not None:
            missed = (~pairs.converged).nonzero().flatten().tolist()
            if missed:
                worst = max(float(pairs.residuals[i] / pairs.eigenvalues[i].abs().clamp_min(1e-300)) for i in missed)
                self.console.print(
                    f"warning: {task.name}: eigenpairs {', '.join(str(i + 1) for i in missed)} did not converge in "
                    f"{pairs.products} products (worst relative {worst:.2g}, tol {pairs.tol:g}); they are left "
                    f"out, {update.added} are kept",
                    highlight=False,
                )
            if update.dropped:
                self.console.print(
                    f"note: the memory is full ({self.parts.memory.k_max} directions): {update.dropped} dropped, the "
                    f"largest with eigenvalue {update.dropped_eigenvalue:.3g}",
                    highlight=False,
                )
        self.console.print(
            task_row(
                TaskOutcome(
                    index=task.index,
                    total=len(self.parts.tasks),
                    tasks=[t.name for t in self.parts.tasks],
                    matrix=self.matrix + [[None] * len(self.parts.tasks)] * (len(self.parts.tasks) - len(self.matrix)),
                    seconds=self.seconds[-1],
                    eigenvalues=None if pairs is None else pairs.eigenvalues.tolist(),
                    converged=None if pairs is None else int(pairs.converged.sum()),
                    products=None if pairs is None else pairs.products,
                    leak=leak,
                    memory_columns=None if pairs is None else self.parts.memory.columns,
                )
            )
        )


def _save_basis(basis: torch.Tensor, path: Path) -> None:
    """Write eigenvectors (k, P), whole or not at all; raises OSError where they cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({"basis": basis.cpu().contiguous()}, temporary)
    except SafetensorError as error:  # the library's own name for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None
    temporary.replace(path)


def run_info(parts: Parts, request: Request, folder: Path) -> RunInfo:
    """What the start panel shows."""
    config, accelerator = parts.config, parts.accelerator
    parameters = list(parts.backbone.parameters())
    projects = parts.method.needs_curvature
    tasks = len(parts.tasks)
    memory = parts.memory
    columns = min(memory.k_max, tasks * memory.k) if memory.merge == "union" else memory.k
    itemsize = 2 if config.nostalgia.basis_dtype == "bfloat16" else parts.space.zeros(0).element_size()
    local = parts.space.size if memory.replicates(parts.space, columns) else parts.space.local_size
    return RunInfo(
        method=parts.method.name,
        seed=config.experiment.seed,
        tasks=[
            TaskInfo(
                name=t.name, num_classes=len(t.classes), num_train=len(t.train), num_val=len(t.val), source=t.source
            )
            for t in parts.tasks
        ],
        model=config.model.name,
        total_parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        projected_parameters=parts.space.size if projects else 0,
        projected=config.nostalgia.project_params if projects else "",
        devices=f"{accelerator.num_processes} x {device_name(accelerator)}",
        strategy=strategy(accelerator),
        precision=parts.precision,
        per_device_batch_size=config.dataset.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        global_batch_size=config.dataset.batch_size
        * config.train.gradient_accumulation_steps
        * accelerator.num_processes,
        epochs=[parts.epochs(t) for t in parts.tasks],
        run_dir=folder,
        suite=request.suite,
        basis_columns=columns if projects else 0,
        basis_bytes=columns * local * itemsize if projects else 0,
    )


def device_name(accelerator: Accelerator) -> str:
    return "cpu" if accelerator.device.type == "cpu" else torch.cuda.get_device_name(accelerator.device)
