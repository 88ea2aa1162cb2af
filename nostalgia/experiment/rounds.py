"""The rounds of a run: what happens with each task, stage by stage, and where it may stop and go on."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from nostalgia.checkpoint.store import TASK_END, Contents
from nostalgia.data.tasks import Task
from nostalgia.errors import NostalgiaError
from nostalgia.evaluation.accuracy import Score, evaluate
from nostalgia.experiment.checkpointing import Checkpointer
from nostalgia.experiment.curvature_phase import CurvaturePhase
from nostalgia.experiment.heads import new_heads, take_up
from nostalgia.experiment.info import device_name
from nostalgia.experiment.observer import PhaseObserver
from nostalgia.experiment.resume import Resumed
from nostalgia.experiment.setup import Parts, checkpoint_schedule, optimization, versions
from nostalgia.experiment.snapshot import Snapshot
from nostalgia.experiment.state import STAGES, RunState
from nostalgia.linalg.lanczos import Eigenpairs, LanczosState
from nostalgia.methods import StepRule
from nostalgia.methods.finetune import PlainStep
from nostalgia.models import norm_statistics
from nostalgia.parallel.accelerator import strategy, wrap_by_layer
from nostalgia.parallel.guard import check_consistency
from nostalgia.projection import MemoryUpdate
from nostalgia.reporting.console import TaskOutcome, task_row
from nostalgia.reporting.progress import Progress
from nostalgia.reporting.results import RunResults
from nostalgia.reporting.run_log import RunLog
from nostalgia.training.loop import Phase, Training
from nostalgia.training.task_model import TaskModel


class Experiment:
    """The rounds of a run, one after the other: a round is one task, or all of them for joint training."""

    def __init__(self, parts: Parts, folder: Path, progress: Progress, resumed: Resumed | None = None) -> None:
        self.parts, self.folder, self.progress = parts, folder, progress
        self.config, self.accelerator = parts.config, parts.accelerator
        self.console = progress.console
        self.log = self._make_log(None if resumed is None else resumed.log_position)
        self.state = RunState()
        self.curvature = CurvaturePhase(parts, folder, progress, self.log)
        self.checkpoints = Checkpointer(
            folder, self.accelerator, checkpoint_schedule(self.config), self._contents, self._warn
        )
        self.initial = {k: v.detach().cpu().clone() for k, v in parts.backbone.state_dict().items()}
        self.snapshot = Snapshot(parts, self.curvature, self.initial)
        # Evaluation images are few and read again after every task: their loaders are made once.
        self.val_loaders = [parts.loader([task], train=False) for task in parts.tasks]
        self.rounds = [parts.tasks] if parts.method.joint else [[task] for task in parts.tasks]
        self.training: Training | None = None  # the phase in progress
        self.observer: PhaseObserver | None = None  # of it
        self.warm_head: nn.Module | None = None
        self.resumed = resumed if resumed is not None and resumed.state is not None else None
        self.solve: LanczosState | None = None  # an eigensolve to go on with
        self._started = self._round_started = time.perf_counter()
        if self.resumed is not None:
            self.state = self.snapshot.restore(self.resumed)
            self.log.step = self.state.step

    def run(self) -> RunResults:
        self.checkpoints.stop.listen()
        try:
            while self.state.round <= len(self.rounds):
                self._round(self.rounds[self.state.round - 1])
        except NostalgiaError:
            self.checkpoints.close()  # what is being written is the last good one
            raise
        self.checkpoints.close()
        warm = self.config.train.head_warmup_epochs > 0 and not self.parts.method.joint
        return RunResults.of(
            tasks=[t.name for t in self.parts.tasks],
            classes=[t.classes for t in self.parts.tasks],
            accuracy_matrix=self.state.matrix,
            before_accuracies=self.state.before if warm else None,
            baseline_accuracies=self.state.baseline if warm else None,
            method=self.parts.method.name,
            seed=self.config.experiment.seed,
            world_size=self.accelerator.num_processes,
            seconds=self._elapsed(),
            versions=versions(),
            details={
                "model": self.config.model.name,
                "seconds_per_task": self.state.seconds,
                "device": device_name(self.accelerator),
                "strategy": strategy(self.accelerator),
                "precision": self.parts.precision,
                "checkpoint_seconds": self.checkpoints.seconds,
            },
        )

    # -- a round, stage by stage -----------------------------------------------------------------------------------

    def _round(self, tasks: list[Task]) -> None:
        self._round_started = time.perf_counter()
        stages = {
            "baseline": self._baseline,
            "warmup": self._warm_up,
            "train": self._train,
            "evaluate": self._evaluate,
            "curvature": self._curvature,
        }
        with self.progress.task(self.state.round, tasks[0].name if len(tasks) == 1 else "joint"):
            for stage in STAGES[STAGES.index(self.state.stage) :]:
                self.state.stage = stage
                if self.resumed is not None and self.resumed.phase is None:
                    self.solve = self.resumed.solve
                    self._stand_where_it_was()
                stages[stage](tasks)
            state = self.state
            state.seconds.append(self._round_elapsed())
            state.round, state.stage, state.round_elapsed, state.leak = state.round + 1, STAGES[0], 0.0, None
            self._round_started = time.perf_counter()
            self.checkpoints.reach(TASK_END)

    def _baseline(self, tasks: list[Task]) -> None:
        """What a head alone gives on the backbone the run began with: forward transfer is measured against it."""
        if not self._warms_up:
            return
        if tasks[0].index == 1:
            self.state.baseline.append(None)  # the first task's counts nowhere
            return
        backbone = copy.deepcopy(self.parts.backbone)
        backbone.load_state_dict(self.initial)
        self.state.baseline.append(self._fit_head(tasks[0], backbone, record=False)[1].accuracy)

    def _warm_up(self, tasks: list[Task]) -> None:
        """Fit the new head alone, and measure what it gives before the task's own training."""
        if not self._warms_up:
            return
        self.warm_head, score = self._fit_head(tasks[0], self.parts.backbone, record=True)
        self.state.before.append(score.accuracy)
        self.log.evaluation(
            step=self.state.step,
            tasks=[tasks[0].name],
            accuracies=[score.accuracy],
            losses=[score.loss],
            split="before",
        )

    def _train(self, tasks: list[Task]) -> None:
        heads = new_heads(self.parts, tasks) if self.warm_head is None else [self.warm_head]
        name = tasks[0].name if len(tasks) == 1 else "joint"
        loader = self.parts.loader(tasks, train=True, name=name)
        epochs = self.parts.epochs(tasks[0]) if len(tasks) == 1 else self.config.train.epochs
        validate = self._validation(tasks[0]) if len(tasks) == 1 else None
        observer = PhaseObserver(self.progress, self.log, name, self.state.step, validate=validate)
        model = self._phase(self.parts.backbone, heads, loader, epochs, observer)
        self.warm_head = None
        self.state.step += observer.steps
        self.state.leak = observer.leak
        parts = self.parts
        parts.backbone = model.backbone  # type: ignore[assignment]
        norm_statistics.average_over_ranks(parts.backbone)
        take_up(parts, tasks, list(model.heads))
        parts.norm_statistics += [norm_statistics.capture(parts.backbone)] * len(tasks)

    def _evaluate(self, tasks: list[Task]) -> None:
        """A row of the accuracy matrix: each task seen, with its own head and batch-norm statistics."""
        parts, count = self.parts, len(self.parts.tasks)
        own = self.config.model.norm_statistics == "per_task"
        scores = []
        for task, head, statistics in zip(parts.tasks, parts.heads, parts.norm_statistics, strict=False):
            with norm_statistics.using(parts.backbone, statistics if own else None):
                scores.append(self._score(TaskModel(parts.backbone, [head]), task))
        self.log.evaluation(
            step=self.state.step,
            tasks=[t.name for t in parts.tasks[: len(scores)]],
            accuracies=[s.accuracy for s in scores],
            losses=[s.loss for s in scores],
        )
        matrix = self.state.matrix
        matrix.extend([None] * count for _ in range(len(scores) - 1 - len(matrix)))  # joint fills the last row only
        matrix.append([s.accuracy for s in scores] + [None] * (count - len(scores)))

    def _curvature(self, tasks: list[Task]) -> None:
        pairs, update = None, None
        if self.curvature.wanted:
            images = self.parts.loader(tasks, train=True).images
            solve, self.solve = self.solve, None
            pairs, update = self.curvature.run(tasks[0], images, solve, self.checkpoints.after_product)
        if not self.parts.method.joint:
            self._report(tasks[0], pairs, update)

    # -- phases of training ----------------------------------------------------------------------------------------

    @property
    def _warms_up(self) -> bool:
        return self.config.train.head_warmup_epochs > 0 and not self.parts.method.joint

    def _fit_head(self, task: Task, backbone: nn.Module, *, record: bool) -> tuple[nn.Module, Score]:
        """Train a new head on ``backbone``, which stays as it is; ``record``: as a part of the run."""
        loader = self.parts.loader([task], train=True)
        observer = PhaseObserver(
            self.progress,
            self.log,
            task.name,
            self.state.step,
            label="warmup",
            record=record,
            finish=lambda model: self._score(model, task),
        )
        backbone.set_trainable(False)  # type: ignore[operator]
        epochs = self.config.train.head_warmup_epochs
        model = self._phase(backbone, new_heads(self.parts, [task]), loader, epochs, observer, head_only=True)
        model.backbone.set_trainable(True)  # type: ignore[operator]
        if record:
            self.state.step += observer.steps
            self.parts.backbone = model.backbone  # type: ignore[assignment]
        assert observer.score is not None
        return model.heads[0], observer.score

    def _phase(
        self,
        backbone: nn.Module,
        heads: list[nn.Module],
        loader: Any,
        epochs: int,
        observer: PhaseObserver,
        *,
        head_only: bool = False,
    ) -> TaskModel:
        """Train heads, with the backbone unless ``head_only``; returns them, unwrapped."""
        config = self.config
        wrap_by_layer(self.accelerator, backbone)
        phase = Phase(
            accelerator=self.accelerator,
            optimization=optimization(config, epochs, head_only=head_only),
            observer=observer,
            rule=(lambda _: PlainStep()) if head_only else self._step_rule,
            projected=() if head_only else self.parts.projected,
            log_every=config.train.log_every_n_steps,
            max_steps_per_epoch=config.train.max_steps_per_epoch,
            frozen_backbone=head_only,
            guard=self._guard,
            guard_every=config.nostalgia.guard_every_n_steps,
            where=observer.task,
            after_step=self._after_step,
        )
        self.training, self.observer = Training(TaskModel(backbone, heads), loader, phase), observer
        if self.resumed is not None and self.resumed.phase is not None:
            self.training.restore(self.resumed.phase, self.resumed.source)
            observer.leak = self.state.leak
            self._stand_where_it_was()
        try:
            return self.training.run()
        finally:
            self.training = self.observer = None

    def _step_rule(self, parameters: Any) -> StepRule:
        return self.parts.method.step_rule(self.state.round, parameters)

    def _guard(self, parameters: dict[str, torch.Tensor], where: str) -> None:
        memory = self.parts.memory
        tensors = dict(parameters)
        if memory.basis is not None and memory.space is not None and memory.space.placement == "local":
            tensors["the memory's basis"] = memory.basis
        check_consistency(tensors, where)

    def _validation(self, task: Task) -> Any:
        return lambda model: self._score(model, task)

    def _score(self, model: nn.Module, task: Task) -> Score:
        limit = self.config.train.max_eval_batches
        return evaluate(model, self.val_loaders[task.index - 1], self.accelerator, limit, self.checkpoints.reach)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _after_step(self, epoch_done: bool) -> None:
        assert self.training is not None
        self.checkpoints.after_step(self.training.taken, epoch_done)

    def _contents(self, kind: str) -> Contents:
        """All that the run depends on from here; a collective."""
        state = self.state
        saved = copy.copy(state)
        saved.elapsed, saved.round_elapsed = self._elapsed(), self._round_elapsed()
        if self.observer is not None:
            saved.leak = self.observer.leak
        contents = self.snapshot.take(kind, saved, self.training, self.log.position())
        contents.before = self.log.sync
        return contents

    def _stand_where_it_was(self) -> None:
        """The last thing before a resumed run goes on: its random generators, which setting it up has used."""
        assert self.resumed is not None
        self.snapshot.restore_random_state(self.resumed)
        self.resumed = None

    def _elapsed(self) -> float:
        return self.state.elapsed + time.perf_counter() - self._started

    def _round_elapsed(self) -> float:
        return self.state.round_elapsed + time.perf_counter() - self._round_started

    def _warn(self, line: str) -> None:
        self.console.print(f"warning: {line}", highlight=False, markup=False)

    def _make_log(self, position: dict[str, int] | None) -> RunLog:
        logger = self.config.logger
        wandb = {
            "project": logger.project,
            "entity": logger.entity,
            "name": logger.name,
            "group": logger.group,
            "tags": logger.tags,
            "mode": logger.mode,
        }
        return RunLog(
            self.folder,
            self.accelerator,
            tensorboard=logger.tensorboard,
            wandb=wandb if logger.use_wandb else None,
            save_dir=None if logger.save_dir is None else Path(logger.save_dir),
            config=OmegaConf.to_container(OmegaConf.structured(self.config), resolve=True),  # type: ignore[arg-type]
            resume=position,
            warn=self._warn,
        )

    def _report(self, task: Task, pairs: Eigenpairs | None, update: MemoryUpdate | None) -> None:
        if pairs is not None and update is not None:
            missed = (~pairs.converged).nonzero().flatten().tolist()
            if missed:
                worst = max(float(pairs.residuals[i] / pairs.eigenvalues[i].abs().clamp_min(1e-300)) for i in missed)
                self._warn(
                    f"{task.name}: eigenpairs {', '.join(str(i + 1) for i in missed)} did not converge in "
                    f"{pairs.products} products (worst relative {worst:.2g}, tol {pairs.tol:g}); they are left "
                    f"out, {update.added} are kept"
                )
            if update.dropped:
                self.console.print(
                    f"note: the memory is full ({self.parts.memory.capacity} directions): {update.dropped} dropped, "
                    f"the largest with eigenvalue {update.dropped_eigenvalue:.3g}",
                    highlight=False,
                )
        count = len(self.parts.tasks)
        self.console.print(
            task_row(
                TaskOutcome(
                    index=task.index,
                    total=len(self.parts.tasks),
                    tasks=[t.name for t in self.parts.tasks],
                    matrix=self.state.matrix + [[None] * count for _ in range(count - len(self.state.matrix))],
                    seconds=self._round_elapsed(),
                    eigenvalues=None if pairs is None else pairs.eigenvalues.tolist(),
                    converged=None if pairs is None else int(pairs.converged.sum()),
                    products=None if pairs is None else pairs.products,
                    leak=self.state.leak,
                    memory_columns=None if pairs is None else self.parts.memory.columns,
                )
            )
        )
