"""A continual-learning method: one class whose hooks a run calls. Every hook's default is plain fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.data.exemplars import Exemplar, ExemplarLoader
from nostalgia.data.stream import Batch
from nostalgia.data.tasks import Task
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models.objective import Objective, Output


def _no_pause(work: int, done: int, of: int, label: str = "") -> None:
    """A place to stop that never stops."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a method will keep at most between tasks."""

    bytes: int = 0  # over all ranks
    text: str = ""  # for the run's start panel: "at most 128 x 111k numbers, replicated"


@dataclass
class TaskContext:
    """What a run hands to a method: the task in training, and the means to work with it.

    ``model`` is a `TaskModel`: wrapped (DDP, FSDP2) while the task is trained, an ordinary module with whole parameters on
    every rank in `Method.end_task`. ``parameters`` are those in scope (``model.scope``), by name within the backbone;
    under FSDP2 they are DTensor shards while training. ``head`` is the place of the task's head among the model's.
    """

    index: int  # of the task, from 1
    tasks: Sequence[Task]  # seen so far; the present one last, all of them for joint training
    num_tasks: int  # of the whole run
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    space: VectorSpace  # of the parameters in scope
    objective: Objective
    accelerator: Accelerator
    curvature: CurvatureOptions  # how curvature is measured: the configuration's `curvature` section
    seed: int
    head: int
    image_bytes: int  # of one stored exemplar: an image at the network's size, 3 bytes a pixel
    samples: Callable[..., list[Batch]]
    """``samples(n, batch_size=None)``: this rank's share of a fixed stratified choice of n of the present task's training
    images, not augmented. A collective."""
    loader: Callable[[Sequence[Exemplar]], ExemplarLoader]
    """``loader(exemplars)``: training batches of stored (task, index) pairs; their heads must be in the model."""
    validate: Callable[[], float] = lambda: 0.0
    """In `Method.end_task`: mean validation accuracy over the tasks seen, of the network as it stands. A collective."""
    every_image: Callable[[], Iterator[Batch]] | None = None
    """``every_image()``: this rank's share of all training images of the task, each once, as every epoch shows them. None where
    augmentation changes them from epoch to epoch. A rank's batches are as many as another's; padded rows have weight 0."""
    passes: float = 0.0  # how often the task's training sees each of them
    begins_anew: bool = False
    """Whether adapters are added into the weights before the next task, and begin again with B = 0."""

    @property
    def wants_curvature(self) -> bool:
        """Whether the task's curvature is used: by a later task, or because `curvature.last_task` asks for the last's."""
        return self.index < self.num_tasks or self.curvature.last_task

    def first_order_mask(self) -> Tensor | None:
        """0 at each A (P_local,) where adapters begin anew, 1 elsewhere; None where all count.

        At B = 0 the weight s B A moves with B alone, to first order. A direction held in both would let B move in it, with a
        change of A that does nothing taking it back.
        """
        if not (self.begins_anew and any(".lora_A." in name for name in self.parameters)):
            return None
        counts = (torch.full_like(p, float(".lora_A." not in name)) for name, p in self.parameters.items())
        return self.space.take(p.detach() for p in counts)

    pause: Callable[..., None] = _no_pause
    """``pause(work, done, of, label="eigenpairs")``: within a long `end_task`, reports progress (``work`` units spent, ``done``
    of ``of`` of what ``label`` says), and lets a run that was asked to stop do so, with a checkpoint of the method's state,
    from which `end_task` is called again. All ranks call it together."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a method without any."""


class Method:
    """One method over all tasks of a run; a subclass overrides the hooks it needs.

    All ranks call every hook together, so a hook may use collectives. ``self.config`` holds the options (``method.<option>`` on
    the command line), ``self.task`` the `TaskContext` of the task in training, from before `begin_task` to after `end_task`.

    `examples/own_method.py` has a regulariser and a replay method, each complete.
    """

    name: ClassVar[str] = ""
    joint: ClassVar[bool] = False
    """Train once, on the data of all tasks."""
    all_heads: bool = False
    """Keep the heads of earlier tasks in the trained model, in the order of the tasks; an instance may set it."""
    trains_heads: bool = False
    """Train those heads along; otherwise they are frozen."""
    frozen_backbone: ClassVar[bool] = False
    """Train heads alone."""
    needs_metric: bool = False
    """Takes steps in the optimizer's metric, which must be known; an instance may set it."""
    restarts_adapters: bool = False
    """Merge LoRA adapters into the weights and draw them anew (B = 0) before every task but the first, whatever
    ``model.lora.merge``; without ``model.use_lora`` the run is refused."""
    prefers_merged_adapters: bool = False
    """What ``model.lora.merge=auto`` means: merge and begin anew (B = 0, A as it is), or never; an instance may set it."""
    keeps_positions: bool = False
    """Holds parameters to values they had, so that adapters cannot begin anew: ``model.lora.merge=task`` is refused;
    an instance may set it."""
    strengths: ClassVar[tuple[float, ...]] = ()
    """Grid over which a comparison searches `strength_option`."""
    strength_option: ClassVar[str] = "strength"

    Config: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass of the options under ``method.``; its fields are made by `nostalgia.options.option`."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.task: TaskContext = None  # type: ignore[assignment]

    def check(self, num_tasks: int, curvature: CurvatureOptions) -> None:
        """Raise UsageError, before anything is loaded, for options that cannot work in a run of ``num_tasks``."""

    def begin_task(self, task: TaskContext) -> None:
        """Before the first step. Called again when a run resumes within the task, see `load_state_dict`."""

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        """Forward pass and loss of one micro-batch, summed over its samples; the default is the training objective.

        The step divides the sum over all its micro-batches and ranks by the number of its samples.
        """
        return self.task.objective(model, batch)

    def gradients(self) -> None:
        """Change the gradients in place, once a step: they are synchronised and unscaled, and not clipped yet.

        The place for the gradient of a penalty: added here it is exact under DDP, FSDP2 and accumulation.
        """

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step."""
        optimizer.step()

    def end_task(self, task: TaskContext) -> None:
        """After the last step, before evaluation: take in what is to be remembered of the task."""

    def metrics(self) -> dict[str, float]:
        """Numbers to log under ``method/``, asked for at logged steps and at the end of each epoch."""
        return {}

    def bytes_remembered(self) -> int:
        """What is kept between tasks, over all ranks, the network excluded."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on: nested dicts and lists of plain values, tensors, and `Block` s.

        Tensors are the same on all ranks, or DTensors; a `Block` is spread over ranks. A state that is not ends the run, which
        would resume with rank 0's on all of them.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; plain tensors come whole, on the run's device, on every rank.

        A run that resumes within a task calls this before `begin_task`, so that it finds what earlier tasks left, and once
        more after it, so that what it took from the network as it stands is put back. A name of the state that no call has
        read, and whose value is not None, ends the run: it would be lost.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no load_state_dict for {', '.join(state)}")

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        """What `bytes_remembered` may come to, for parameters ``space`` in scope; all ranks ask together."""
        return MemoryPlan()

    def replicated_tensors(self) -> dict[str, Any]:
        """Tensors by name that must be bitwise the same on all ranks: what the run's guard compares."""
        return {}

    def eigenpairs(self) -> Eigenpairs | None:
        """Eigenpairs of the curvature of the task that has just ended, for analysis; None where none were computed."""
        return None

    def factors(self) -> KroneckerFactors | None:
        """Kronecker factors of the curvature of the task that has just ended, for analysis; None where none were computed."""
        return None

    def report(self) -> dict[str, Any]:
        """Plain values on what is remembered, for ``curvature/task<i>.json``, which a task with `eigenpairs` has; a collective,
        after `end_task`."""
        return {}

    def note(self) -> str:
        """One line on what the end of the task did, for the console; empty for none."""
        return ""
