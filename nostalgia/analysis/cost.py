"""What a full run would cost, from the times that a short one of the same kind took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.panel import Panel
from rich.table import Table

from nostalgia.analysis.run_folder import RunFolder
from nostalgia.logging.progress import duration
from nostalgia.utils.counts import products_of, steps_per_epoch
from nostalgia.utils.sizes import num_bytes

FORWARD = 1 / 3  # of a training step's time: a forward pass alone


@dataclass(frozen=True)
class TaskLoad:
    """Images of a task, and its epochs."""

    num_train: int
    num_val: int  # that an evaluation takes
    epochs: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A full run, as far as its cost goes."""

    tasks: Sequence[TaskLoad]
    joint: bool
    global_batch_size: int
    head_warmup_epochs: int
    top_k: int  # 0: no curvature is taken
    num_samples: int  # of a task's images, at most, that its curvature is taken over
    trained_parameters: int  # backbone and heads
    merged_weights: int  # that adapters are added into: they change with each task
    optimizer_states: int  # numbers the optimizer keeps for each parameter: 2 for AdamW
    memory_bytes: int  # that the method remembers, at most, over all ranks
    memory: str  # in words
    devices: str
    last_task: bool = True  # its curvature is taken too
    max_steps_per_epoch: int | None = None

    @property
    def curved(self) -> Sequence[TaskLoad]:
        """The tasks whose curvature is taken."""
        return self.tasks if self.last_task else self.tasks[:-1]

    def epoch(self, images: int) -> tuple[int, int]:
        """Steps of an epoch over ``images``, and how many of them it takes."""
        steps = steps_per_epoch(images, self.global_batch_size, self.max_steps_per_epoch)
        return steps, min(images, steps * self.global_batch_size)


@dataclass(frozen=True)
class Measured:
    """Times of a short run; None for what it did not do."""

    seconds_per_image: float | None  # of training, over all ranks together
    seconds_per_sample: float | None  # of a curvature product

    @classmethod
    def of(cls, run: RunFolder, num_samples: int) -> Measured:
        """From a run folder; ``num_samples``: at most so many images were in its curvature sets."""
        rates, task = [], None
        for row in run.metrics:
            if row.get("split") == "train" and row.get("images_per_s"):
                if row.get("task") == task:  # the first step of a task also warms caches and allocators up
                    rates.append(row["images_per_s"])
                task = row.get("task")
        products = [
            solve.raw["seconds"] / solve.raw["products"]
            for solve in run.curvature
            if solve.raw.get("products") and solve.raw.get("seconds")
        ]
        return cls(
            1 / statistics.median(rates) if rates else None,
            statistics.median(products) / num_samples if products and num_samples else None,
        )


@dataclass(frozen=True)
class Cost:
    """An estimate; seconds are None where the short run gave nothing to go by."""

    steps: int  # of whole tasks
    warmup_steps: int  # of heads alone
    products: int
    training_seconds: float | None
    evaluation_seconds: float | None
    curvature_seconds: float | None
    checkpoint_bytes: int  # each, without the basis

    @property
    def seconds(self) -> float | None:
        known = [self.training_seconds, self.evaluation_seconds, self.curvature_seconds]
        return None if self.training_seconds is None else math.fsum(value or 0.0 for value in known)


def estimate(work: Workload, measured: Measured) -> Cost:
    """Steps exactly; times as if a forward pass took a third of a step, and a pair three products.

    A product's time grows with its samples, which is too much where the short run's few left the device idle.
    """
    warm = 0 if work.joint else work.head_warmup_epochs
    trained = [(task.num_train, task.epochs) for task in work.tasks]
    if work.joint:
        trained = [(sum(task.num_train for task in work.tasks), work.tasks[0].epochs)]
    steps, images = (sum(work.epoch(size)[i] * epochs for size, epochs in trained) for i in (0, 1))
    # Heads are fitted on the run's backbone, and from task 2 on also on the one it began with.
    fits = [warm * (1 if index == 0 else 2) for index in range(len(work.tasks))]
    pairs = list(zip(fits, work.tasks, strict=True))
    forward = sum(fit * work.epoch(task.num_train)[1] for fit, task in pairs) + _evaluated(work, fits)
    products = products_of(work.top_k) if work.top_k else 0
    samples = sum(min(work.num_samples, task.num_train) for task in work.curved)
    per_image, per_sample = measured.seconds_per_image, measured.seconds_per_sample
    return Cost(
        steps=steps,
        warmup_steps=sum(work.epoch(task.num_train)[0] * fit for fit, task in pairs),
        products=products,
        training_seconds=None if per_image is None else images * per_image,
        evaluation_seconds=None if per_image is None else forward * per_image * FORWARD,
        curvature_seconds=None if per_sample is None or not products else samples * products * per_sample,
        checkpoint_bytes=4 * (work.trained_parameters * (1 + work.optimizer_states) + work.merged_weights),
    )


def cost_panel(work: Workload, cost: Cost) -> Panel:
    """The estimate for people, at most 80 columns wide."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    alone = f", and {cost.warmup_steps:,} of heads alone" if cost.warmup_steps else ""
    grid.add_row("steps", f"{cost.steps:,} of {work.global_batch_size} images{alone}")
    grid.add_row("training", _time(cost.training_seconds))
    grid.add_row("evaluation", f"{_time(cost.evaluation_seconds)}{', with the heads alone' if alone else ''}")
    if cost.products:
        solves = f"{len(work.curved)} x about {cost.products} products"
        most = "" if cost.curvature_seconds is None else "at most "
        grid.add_row("curvature", f"{most}{_time(cost.curvature_seconds)}: {solves}")
    grid.add_row("together", f"{_time(cost.seconds)} on {work.devices}, without start and figures")
    if work.memory_bytes:
        grid.add_row("memory", f"{work.memory}: {num_bytes(work.memory_bytes)} over all ranks")
    memory = "; what the method remembers once a task beside it" if work.memory_bytes else ""
    grid.add_row("checkpoint", f"{num_bytes(cost.checkpoint_bytes)} each{memory}")
    title = "the full run, by what this one measured"
    return Panel(grid, title=title, title_align="left", expand=False, box=box.ROUNDED)


def _evaluated(work: Workload, fits: Sequence[int]) -> int:
    """Validation images: after each epoch, each fit of a head, and for each row of the accuracy matrix."""
    sizes = [task.num_val for task in work.tasks]
    if work.joint:
        return sum(sizes)
    epochs = sum(task.num_val * task.epochs for task in work.tasks)
    heads = sum(size * (1 if index == 0 else 2) for index, size in enumerate(sizes)) if any(fits) else 0
    return epochs + heads + sum(sum(sizes[: index + 1]) for index in range(len(sizes)))


def _time(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"about {duration(seconds)}"
