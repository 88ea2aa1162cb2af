"""What a run hands to its method for a task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from nostalgia.data.exemplars import Exemplar, ExemplarLoader
from nostalgia.data.prepared import Prepared
from nostalgia.data.stream import Batch, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.errors import UsageError
from nostalgia.experiment.components import Components
from nostalgia.experiment.method_choice import curvature_options
from nostalgia.methods.base import TaskContext
from nostalgia.parallel.coordination import agree


def task_context(
    run: Components,
    tasks: Sequence[Task],
    model: nn.Module,
    heads: Sequence[str],
    pause: Callable[[int, int, int], None],
) -> TaskContext:
    """The context of a round of ``tasks``: one, or all for joint training; ``heads`` are the names of the model's."""
    last = tasks[-1]
    places = [list(heads).index(task.head) for task in tasks]

    def samples(count: int, batch_size: int | None = None) -> list[Batch]:
        return curvature_samples(run, tasks, count, batch_size, places)

    def loader(exemplars: Sequence[Exemplar]) -> ExemplarLoader:
        return _exemplar_loader(run, run.tasks[: last.index], exemplars, heads)

    return TaskContext(
        index=tasks[0].index,
        tasks=run.tasks[: last.index],
        num_tasks=1 if run.method.joint else len(run.tasks),
        model=model,
        parameters=run.scope_parameters(),
        space=run.space,
        objective=run.objective,
        accelerator=run.accelerator,
        curvature=curvature_options(run.config),
        seed=run.config.experiment.seed,
        head=places[-1],
        image_bytes=3 * run.view.resizing.size**2,
        samples=samples,
        loader=loader,
        every_image=None if _augmented(run, tasks) else lambda: _every_image(run, tasks, places),
        passes=_passes(run, tasks),
        begins_anew=run.merges_adapters,
        pause=pause,
    )


def _augmented(run: Components, tasks: Sequence[Task]) -> bool:
    return any(policy != "none" for policy in run.augmentations(tasks))


def _every_image(run: Components, tasks: Sequence[Task], places: Sequence[int]) -> Iterator[Batch]:
    for step in run.loader(list(tasks), train=True, heads=places).epoch(0):
        yield from step.micro_batches


def _passes(run: Components, tasks: Sequence[Task]) -> float:
    """How often training sees each image of ``tasks``."""
    epochs, steps = run.epochs(tasks[0]), run.config.train.max_steps_per_epoch
    if steps is None:
        return float(epochs)
    return epochs * min(1.0, steps * run.global_batch_size / max(1, sum(len(task.train) for task in tasks)))


def curvature_samples(
    run: Components,
    tasks: Sequence[Task],
    count: int,
    batch_size: int | None = None,
    heads: Sequence[int] = (0,),
    *,
    train: bool = True,
) -> list[Batch]:
    """This rank's share of a fixed stratified choice of ``count`` training (or validation) images, each batch of one task;
    a collective.

    ``heads`` are the places of the tasks' heads among the model's.
    """
    images = run.loader(list(tasks), train=train).images
    batches = agree(
        run.accelerator,
        lambda: curvature_batches(
            images,
            run.view,
            name=tasks[0].name,
            num_samples=count,
            batch_size=batch_size or run.config.curvature.batch_size,
            seed=run.config.experiment.seed,
            rank=run.accelerator.process_index,
            world_size=run.accelerator.num_processes,
            num_workers=run.config.dataset.num_workers,
        ),
    )
    for batch in batches:
        batch.head = heads[int(batch.tasks[0])]
        batch.tasks = torch.full_like(batch.tasks, batch.head)
    return batches


def _exemplar_loader(
    run: Components, tasks: Sequence[Task], exemplars: Sequence[Exemplar], heads: Sequence[str]
) -> ExemplarLoader:
    named = [task.index for task in tasks if task.head not in heads]
    wanted = sorted({task for task, _ in exemplars} & set(named))
    if wanted:
        raise UsageError(
            f"method={run.method.name}: exemplars of task {wanted[0]}, whose head is not in the model; set all_heads = True"
        )
    return ExemplarLoader(
        exemplars,
        Prepared([task.train for task in tasks], [task.transform for task in tasks], run.view.resizing),
        run.view,
        augment=run.augmentations(tasks),
        heads=[list(heads).index(task.head) if task.head in heads else 0 for task in tasks],
        seed=run.config.experiment.seed,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        threads=min(4, os.cpu_count() or 1),
    )
