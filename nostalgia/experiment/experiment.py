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
from nostalgia.experiment.outcome import make_log, run_results, say_outcome
from nostalgia.experiment.phases import Phases
from nostalgia.experiment.run_checkpoint import RunCheckpoint
from nostalgia.experiment.state import STAGES, RunState

if TYPE_CHECKING:
    from nostalgia.checkpoint.store import CheckpointContents
    from nostalgia.data.tasks import Task
    from nostalgia.experiment.components import Components
    from nostalgia.experiment.resume import ResumedRun
    from nostalgia.logging.progress import Progress
    from nostalgia.logging.results import RunResults


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
        self.run_checkpoint = RunCheckpoint(run, self.analysis, self.initial, folder)
        self.evaluator = Evaluator(run)
        self.rounds = [run.tasks] if run.method.joint else [[task] for task in run.tasks]
        self.phases = Phases(self)
        self.warm_head: nn.Module | None = None
        self.resumed = resumed if resumed is not None and resumed.state is not None else None
        self._started = self._round_started = time.perf_counter()
        if self.resumed is not None:
            self.state = self.run_checkpoint.restore(self.resumed)
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
                    self.finish_resuming()
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
        self.state.baseline.append(self.phases.fit_head(tasks[0], backbone, record=False)[1].accuracy)

    def _warm_up(self, tasks: list[Task]) -> None:
        """Fit the new head alone, and measure what it gives before the task's own training."""
        if not self._warms_up:
            return
        self.warm_head, score = self.phases.fit_head(tasks[0], self.c.backbone, record=True)
        self.state.before.append(score.accuracy)
        self.log.evaluation(
            step=self.state.step,
            tasks=[tasks[0].name],
            accuracies=[score.accuracy],
            losses=[score.loss],
            split="before",
        )

    def _train(self, tasks: list[Task]) -> None:
        self.phases.train(tasks, self.warm_head)
        self.warm_head = None

    def _end(self, tasks: list[Task]) -> None:
        """The method takes in what it remembers of the task, which it may also change the network by."""
        run = self.c
        self._ending = time.perf_counter()
        heads = list(run.heads) if run.method.all_heads or run.method.joint else [tasks[0].head]
        with ExitStack() as stack:
            display: list[Any] = []

            def pause(work: int, done: int, of: int, label: str = "eigenpairs") -> None:
                if not display:
                    display.append(stack.enter_context(self.progress.eigensolve(of, label)))
                display[0].products(work, done)
                self.checkpoints.after_product(work)

            context = task_context(run, tasks, run.model(heads), heads, pause)
            context.validate = self.evaluator.mean_accuracy
            run.method.task = context
            run.method.end_task(context)
        self.phases.compare_ranks(context.model, f"{tasks[-1].name}, at its end")
        self.state.between_overhead += time.perf_counter() - self._ending
        self._ending = None
        self.state.memory_bytes = max(self.state.memory_bytes, int(run.method.bytes_remembered()))
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
    def resumes_a_phase(self) -> bool:
        return self.resumed is not None and self.resumed.phase is not None

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _contents(self, kind: str) -> CheckpointContents:
        """All that the run depends on from here; a collective."""
        saved = copy.copy(self.state)
        saved.elapsed, saved.round_elapsed = self._elapsed(), self._round_elapsed()
        saved.training_overhead, saved.between_overhead = self.phases.overhead()
        if self.phases.observer is not None:
            saved.metrics = self.phases.observer.metrics
        if self._ending is not None:
            saved.between_overhead += time.perf_counter() - self._ending
        contents = self.run_checkpoint.take(kind, saved, self.phases.training, self.log.position())
        contents.before = self.log.sync
        return contents

    def finish_resuming(self) -> None:
        """The last thing before a resumed run goes on: its random generators, which setting it up has used."""
        assert self.resumed is not None
        self.run_checkpoint.check_method(self.resumed.source)
        self.run_checkpoint.restore_random_state(self.resumed)
        self.resumed = self.run_checkpoint.method_state = None

    def _elapsed(self) -> float:
        return self.state.elapsed + time.perf_counter() - self._started

    def _round_elapsed(self) -> float:
        return self.state.round_elapsed + time.perf_counter() - self._round_started

    def _warn(self, line: str) -> None:
        self.progress.console.print(f"warning: {line}", highlight=False, markup=False)
