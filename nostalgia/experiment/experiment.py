"""The rounds of a run: what happens with each task, stage by stage, and where it may stop and go on."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nostalgia.errors import NostalgiaError
from nostalgia.experiment.analysis import Analysis
from nostalgia.experiment.checkpointing import Checkpointer, Schedule
from nostalgia.experiment.context import task_context
from nostalgia.experiment.evaluation import Evaluator
from nostalgia.experiment.heads import heads_in_training, new_heads
from nostalgia.experiment.observer import PhaseObserver
from nostalgia.experiment.outcome import make_log, run_results, say_outcome
from nostalgia.experiment.phases import begin_adapters_anew, fit_phase
from nostalgia.experiment.snapshot import Snapshot
from nostalgia.experiment.state import STAGES, RunState

if TYPE_CHECKING:
    from nostalgia.checkpoint.store import CheckpointContents
    from nostalgia.data.tasks import Task
    from nostalgia.evaluation.accuracy import Score
    from nostalgia.experiment.components import Components
    from nostalgia.experiment.resume import ResumedRun
    from nostalgia.reporting.progress import Progress
    from nostalgia.reporting.results import RunResults
    from nostalgia.training.loop import Training


class Experiment:
    """The rounds of a run, one after the other: a round is one task, or all of them for joint training."""

    def __init__(self, run: Components, folder: Path, progress: Progress, resumed: ResumedRun | None = None) -> None:
        self.c, self.folder, self.progress = run, folder, progress
        self.config, self.accelerator = run.config, run.accelerator
        self.log = make_log(run, folder, self._warn, None if resumed is None else resumed.log_position)
        self.state = RunState()
        self.analysis = Analysis(run, folder, self.log, self._warn)
        schedule = Schedule.of(self.config)
        self.checkpoints = Checkpointer(folder, self.accelerator, schedule, self._contents, self._warn)
        self.initial = {k: v.detach().cpu().clone() for k, v in run.backbone.state_dict().items()}
        self.snapshot = Snapshot(run, self.analysis, self.initial, folder)
        self.evaluator = Evaluator(run)
        self.rounds = [run.tasks] if run.method.joint else [[task] for task in run.tasks]
        self.training: Training | None = None  # the phase in progress
        self.observer: PhaseObserver | None = None  # of it
        self.warm_head: nn.Module | None = None
        self.resumed = resumed if resumed is not None and resumed.state is not None else None
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
        return run_results(self.c, self.state, self._elapsed(), self.checkpoints.seconds)

    # -- a round, stage by stage -----------------------------------------------------------------------------------

    def _round(self, tasks: list[Task]) -> None:
        self._round_started = time.perf_counter()
        stages = dict(zip(STAGES, (self._baseline, self._warm_up, self._train, self._end, self._evaluate), strict=True))
        with self.progress.task(self.state.round, tasks[0].name if len(tasks) == 1 else "joint"):
            for stage in STAGES[STAGES.index(self.state.stage) :]:
                self.state.stage = stage
                if self.resumed is not None and self.resumed.phase is None:
                    self._finish_resuming()
                stages[stage](tasks)
            state = self.state
            state.seconds.append(self._round_elapsed())
            state.round, state.stage, state.round_elapsed, state.metrics = state.round + 1, STAGES[0], 0.0, {}
            self._round_started = time.perf_counter()
            self.checkpoints.task_ended()

    def _baseline(self, tasks: list[Task]) -> None:
        """What a head alone gives on the backbone the run began with: forward transfer is measured against it."""
        if not self._warms_up:
            return
        if tasks[0].index == 1:
            self.state.baseline.append(None)  # the first task's counts nowhere
            return
        backbone = copy.deepcopy(self.c.backbone)
        backbone.load_state_dict(self.initial)
        self.state.baseline.append(self._fit_head(tasks[0], backbone, record=False)[1].accuracy)

    def _warm_up(self, tasks: list[Task]) -> None:
        """Fit the new head alone, and measure what it gives before the task's own training."""
        if not self._warms_up:
            return
        self.warm_head, score = self._fit_head(tasks[0], self.c.backbone, record=True)
        self.state.before.append(score.accuracy)
        self.log.evaluation(
            step=self.state.step,
            tasks=[tasks[0].name],
            accuracies=[score.accuracy],
            losses=[score.loss],
            split="before",
        )

    def _train(self, tasks: list[Task]) -> None:
        run, state = self.c, self.state
        if tasks[0].index > 1 and not self._resumes_a_phase:
            begin_adapters_anew(run, tasks[0])
        new = new_heads(run, tasks) if self.warm_head is None else {tasks[0].head: self.warm_head}
        heads = heads_in_training(run, new)
        names = list(heads)
        name = tasks[0].name if len(tasks) == 1 else "joint"
        loader = run.loader(tasks, train=True, name=name, heads=[names.index(task.head) for task in tasks])
        validate = None
        if len(tasks) == 1:
            head, pause_point = names.index(tasks[0].head), self.checkpoints.pause_point
            validate = lambda model: self.evaluator.score(model, tasks[0], head, pause_point)  # noqa: E731
        observer = PhaseObserver(self.progress, self.log, name, state.step, validate=validate)
        model = fit_phase(
            self,
            run.backbone,
            list(heads.values()),
            loader,
            run.epochs(tasks[0]) if len(tasks) == 1 else self.config.train.epochs,
            observer,
            task_context(run, tasks, nn.Identity(), names, self._no_pause),
        )
        self.warm_head = None
        state.step, state.metrics, state.tasks = state.step + observer.steps, observer.metrics, tasks[-1].index
        run.take_trained(model, names, len(tasks))

    def _end(self, tasks: list[Task]) -> None:
        """The method takes in what it remembers of the task, which it may also change the network by."""
        run = self.c
        self._ending = time.perf_counter()
        heads = list(run.heads) if run.method.all_heads or run.method.joint else [tasks[0].head]
        with ExitStack() as stack:
            display: list[Any] = []

            def pause(work: int, done: int, of: int) -> None:
                if not display:
                    display.append(stack.enter_context(self.progress.eigensolve(of)))
                display[0].products(work, done)
                self.checkpoints.after_product(work)

            context = task_context(run, tasks, run.model(heads), heads, pause)
            context.validate = self.evaluator.mean_accuracy
            run.method.task = context
            run.method.end_task(context)
        self.state.between_overhead += time.perf_counter() - self._ending
        self._ending = None
        self.state.memory_bytes = max(self.state.memory_bytes, run.method.bytes_remembered())
        run.capture_statistics(len(tasks))
        pairs = None if run.method.joint else self.analysis.task_ended(tasks[0])
        note = run.method.note()
        if note:
            self.progress.console.print(f"note: {tasks[-1].name}: {note}", highlight=False, markup=False)
        self._pairs = pairs

    _ending: float | None = None  # when the method began to end a task, while it does
    _pairs: Any = None  # of the task that has just ended, to be shown with its accuracies

    def _evaluate(self, tasks: list[Task]) -> None:
        """A row of both accuracy matrices: each task seen, with the task known and not known."""
        run, state = self.c, self.state
        seen = run.tasks[: state.tasks]
        scores = [self.evaluator.score_finished(task, self.checkpoints.pause_point) for task in seen]
        self.log.evaluation(
            step=state.step,
            tasks=[t.name for t in seen],
            accuracies=[s.accuracy for s in scores],
            losses=[s.loss for s in scores],
            class_incremental=[s.class_incremental for s in scores],
        )
        count = len(run.tasks)
        for matrix, row in (
            (state.matrix, [s.accuracy for s in scores]),
            (state.class_incremental, [s.class_incremental for s in scores]),
        ):
            matrix.extend([None] * count for _ in range(len(scores) - 1 - len(matrix)))  # joint: the last row only
            matrix.append([*row, *[None] * (count - len(row))])
        if not run.method.joint:
            say_outcome(self.progress.console, run, state, tasks[0], self._pairs, self._round_elapsed())
        self._pairs = None

    # -- parts of stages -------------------------------------------------------------------------------------------

    @property
    def _warms_up(self) -> bool:
        return self.config.train.head_warmup_epochs > 0 and not self.c.method.joint

    @property
    def _resumes_a_phase(self) -> bool:
        return self.resumed is not None and self.resumed.phase is not None

    def _fit_head(self, task: Task, backbone: nn.Module, *, record: bool) -> tuple[nn.Module, Score]:
        """Train a new head on ``backbone``, which stays as it is; ``record``: as a part of the run."""
        loader = self.c.loader([task], train=True)
        observer = PhaseObserver(
            self.progress,
            self.log,
            task.name,
            self.state.step,
            label="warmup",
            record=record,
            finish=lambda model: self.evaluator.score(model, task, 0, self.checkpoints.pause_point),
        )
        backbone.set_trainable(False)  # type: ignore[operator]
        epochs = self.config.train.head_warmup_epochs
        heads = list(new_heads(self.c, [task]).values())
        context = task_context(self.c, [task], nn.Identity(), [task.head], self._no_pause)
        model = fit_phase(self, backbone, heads, loader, epochs, observer, context, head_only=True)
        model.backbone.set_trainable(True)  # type: ignore[operator]
        if record:
            self.state.step += observer.steps
            self.c.backbone = model.backbone  # type: ignore[assignment]
        assert observer.score is not None
        return model.heads[0], observer.score

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def after_step(self, epoch_done: bool) -> None:
        assert self.training is not None
        self.checkpoints.after_step(self.training.taken, epoch_done)

    def begin_phase(self, training: Training, observer: PhaseObserver) -> None:
        """A phase of training begins, or goes on where a run was interrupted within it."""
        self.training, self.observer = training, observer
        if self._resumes_a_phase:
            assert self.resumed is not None
            assert self.resumed.phase is not None
            training.restore(self.resumed.phase, self.resumed.source)
            if training.phase.method is self.c.method:
                self.snapshot.load_method(self.resumed.source)
            observer.metrics = self.state.metrics
            self._finish_resuming()

    def end_phase(self) -> None:
        assert self.training is not None
        if self.training.phase.method is self.c.method:
            self.state.training_overhead += self.training.clock.seconds
            self.state.between_overhead += self.training.begin_seconds
        self.training = self.observer = None

    def _contents(self, kind: str) -> CheckpointContents:
        """All that the run depends on from here; a collective."""
        saved = copy.copy(self.state)
        saved.elapsed, saved.round_elapsed = self._elapsed(), self._round_elapsed()
        if self.observer is not None:
            saved.metrics = self.observer.metrics
        if self.training is not None and self.training.phase.method is self.c.method:
            saved.training_overhead += self.training.clock.seconds
            saved.between_overhead += self.training.begin_seconds
        if self._ending is not None:
            saved.between_overhead += time.perf_counter() - self._ending
        contents = self.snapshot.take(kind, saved, self.training, self.log.position())
        contents.before = self.log.sync
        return contents

    def _finish_resuming(self) -> None:
        """The last thing before a resumed run goes on: its random generators, which setting it up has used."""
        assert self.resumed is not None
        self.snapshot.check_method(self.resumed.source)
        self.snapshot.restore_random_state(self.resumed)
        self.resumed = self.snapshot.method_state = None

    def _elapsed(self) -> float:
        return self.state.elapsed + time.perf_counter() - self._started

    def _round_elapsed(self) -> float:
        return self.state.round_elapsed + time.perf_counter() - self._round_started

    def _warn(self, line: str) -> None:
        self.progress.console.print(f"warning: {line}", highlight=False, markup=False)

    @staticmethod
    def _no_pause(work: int, done: int, of: int) -> None:
        """Between steps the loop itself is where a run may stop."""
