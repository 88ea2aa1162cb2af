"""What a training step of the product costs beside a plain Accelerate loop, and where the time goes."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from bench import common
from bench.networks import CLASSES, MODELS
from bench.projection import cosine_memory
from bench.step_clocks import Clock, PartTimes
from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.data.images import ArrayImages
from nostalgia.data.resizing import Resizing
from nostalgia.data.stream import Batch, Prepared, TaskLoader, View, curvature_batches
from nostalgia.data.tasks import Task
from nostalgia.errors import UsageError
from nostalgia.experiment.observer import PhaseObserver
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.logging.progress import Progress
from nostalgia.logging.run_log import RunLog
from nostalgia.methods import Method, Objective, TaskContext
from nostalgia.methods.loading import make_method
from nostalgia.models import attach_lora, build_backbone
from nostalgia.models.backbones import scope_parameters
from nostalgia.models.heads import make_head
from nostalgia.models.task_model import TaskModel
from nostalgia.parallel.accelerator import launch_info, make_accelerator
from nostalgia.training import step as step_module
from nostalgia.training.loop import Optimization, Phase, Training
from nostalgia.training.optimizers import OPTIMIZERS, make_optimizer

ABOUT = """\
Milliseconds of a training step: the product's own `Training` with its observer and log, and a plain loop of
zero_grad, forward, cross-entropy, backward, clip_grad_norm_, step over the same network, batches, precision, optimizer
and loader under Accelerate. Windows of --steps steps take turns, product and plain; medians of --repeats pairs. On a CPU
processor time of this process, on a GPU CUDA events; under torchrun rank 0's, of which it also is part to wait.

columns:
  plain, step   milliseconds a step of the plain loop and of the product
  ratio         median over the pairs of windows, with the least and the greatest
  parts         milliseconds a step of further windows of the product, with a clock around each part (a GPU is waited for
                at each): loader, passes (forward and backward), gradients (projection or penalty), clip, optimizer (its own
                step), step (what a method adds to it: the constrained step), log

Both begin as a run's second task: nostalgia holds m orthonormal directions, kronecker factors of 8 images, one draw each.
`kronecker` is the penalty alone, its default; `kronecker+anchor` has the distillation as well, a forward pass more.
"""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "nostalgia32": ("nostalgia", {"top_k": 32}),
    "nostalgia128": ("nostalgia", {"top_k": 128}),
    "kronecker": ("kronecker", {"num_samples": 8, "draws": 1}),
    "kronecker+anchor": ("kronecker", {"anchor": 1.0, "num_samples": 8, "draws": 1}),
}
NETWORKS = {"vit_tiny": "vit_tiny", "vit_s": "vit_s16", "vit_b": "vit_b16", "resnet50": "resnet50"}
PARTS = ("loader", "passes", "gradients", "clip", "optimizer", "step", "log")
LORA = ("vit_tiny", "vit_s", "vit_b")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parser(
        "step",
        ABOUT,
        [
            "python -m bench.step --threads 1 --out step.json",
            "python -m bench.step --network vit_s --lora --image-size 56 --batch-size 8 --steps 4 --threads 1",
            "python -m bench.step --device cuda --network vit_b --precision bf16 --batch-size 128 --steps 20",
            "torchrun --nproc_per_node 2 -m bench.step --threads 1",
        ],
    )
    arguments.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one"
    )
    arguments.add_argument("--network", choices=list(NETWORKS), default="vit_tiny", help="(default vit_tiny)")
    which = arguments.add_mutually_exclusive_group()
    which.add_argument("--lora", action="store_true", help="train LoRA adapters (r = 8, no dropout) and the head")
    which.add_argument("--whole", action="store_true", help="train the whole network (the default)")
    arguments.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default all)")
    arguments.add_argument("--batch-size", type=int, default=32, help="per process (default 32)")
    arguments.add_argument("--image-size", type=int, help="side in pixels (default the network's own)")
    arguments.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(default adamw)")
    arguments.add_argument("--precision", choices=("32", "tf32", "bf16"), default="32", help="(default 32)")
    arguments.add_argument("--steps", type=int, default=20, help="steps of a window (default 20)")
    arguments.add_argument("--repeats", type=int, default=5, help="pairs of windows, at least 1 (default 5)")
    arguments.add_argument("--log-every", type=int, default=50, help="train.log_every_n_steps (default 50)")
    common.run(benchmark, arguments, argv)


def benchmark(options: argparse.Namespace) -> None:
    methods = common.choices(options.methods, list(METHODS), "--methods")
    if options.lora and options.network not in LORA:
        raise UsageError(f"--lora with --network {options.network}: adapters go on {', '.join(LORA)}")
    for flag in ("steps", "repeats", "batch_size"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: allowed is 1 or more")
    launch = launch_info({"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[options.device])
    accelerator = make_accelerator(launch, options.precision)
    rows = [Pair(options, name, accelerator).measure() for name in methods]
    if not accelerator.is_main_process:
        return
    first = rows[0]
    results = {
        "benchmark": "step",
        "world_size": accelerator.num_processes,
        "clock": "cuda events" if accelerator.device.type == "cuda" else "processor time",
        "parameters": first["parameters"],
        "rows": rows,
    }
    common.report(options, accelerator.device, results, [_table(rows, options, accelerator.num_processes)])


class Pair:
    """The product's training of one method and the plain loop, on equal networks and loaders, in turns."""

    def __init__(self, options: argparse.Namespace, method: str, accelerator: Accelerator) -> None:
        self.options, self.name, self.accelerator = options, method, accelerator
        kind, values = METHODS[method]
        self.method = make_method(kind, values, options.seed)
        self.images = self._images(options.image_size or make_backbone(options).image_size)
        self.clock, self.parts = Clock(accelerator.device), PartTimes(accelerator.device)
        self.optimization = Optimization(epochs=2 * options.repeats + 1, optimizer=options.optimizer, warmup_epochs=0)

    def measure(self) -> dict[str, Any]:
        product: list[float] = []
        with tempfile.TemporaryDirectory() as folder, clip_timed(self.parts):
            plain = self._plain_windows()
            training, observer = self._training(Path(folder))
            pairs: list[tuple[float, float]] = []
            observer.between = lambda number: self._turn(number, product, plain, pairs)
            training.run()
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        steps, count = self.options.steps, self.options.repeats
        return {
            "method": self.name,
            "parameters": self.parameters,
            "plain_ms": statistics.median(theirs for _, theirs in pairs) / steps,
            "step_ms": statistics.median(ours for ours, _ in pairs) / steps,
            "ratio": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
            "windows_ms": [[ours / steps, theirs / steps] for ours, theirs in pairs],
            "parts_ms": {part: self.parts.milliseconds[part] / (steps * count) for part in PARTS},
        }

    def _turn(
        self, number: int, product: list[float], plain: Iterator[float], pairs: list[tuple[float, float]]
    ) -> None:
        """After each epoch of the product, the first of which warms up; the later half is measured in parts."""
        product.append(self.clock.stop())
        if number <= self.options.repeats + 1:
            theirs = next(plain)
            if number > 1:
                pairs.append((product[-1], theirs))
        self.parts.open = number > self.options.repeats
        self.clock.start()

    def _loader(self) -> TaskLoader:
        view = View(self.images.resizing, (0.5,) * 3, (0.5,) * 3, self.accelerator.device)
        return TaskLoader(
            self.images,
            view,
            name="bench",
            per_device_batch_size=self.options.batch_size,
            train=True,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _images(self, size: int) -> Prepared:
        count = self.options.batch_size * self.options.steps * self.accelerator.num_processes
        draws = np.random.default_rng(self.options.seed)
        pixels = draws.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        classes = [str(number) for number in range(CLASSES)]
        images = ArrayImages("noise", pixels, draws.integers(0, CLASSES, count).tolist(), classes)
        return Prepared([images], [()], Resizing(size))

    def _plain_windows(self) -> Iterator[float]:
        """Milliseconds of one window after the other of the plain loop."""
        options, accelerator = self.options, self.accelerator
        backbone = make_backbone(options).to(accelerator.device)
        head = make_head(backbone.feature_dim, CLASSES, options.seed).to(accelerator.device)
        model = nn.Sequential(backbone, head)
        bare = make_optimizer(model, options.optimizer, vars(self.optimization))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(bare, self.optimization.epochs * options.steps)
        model, optimizer = accelerator.prepare(model, bare)
        loader, clock, epoch = self._loader(), Clock(accelerator.device), 0
        model.train()
        while True:
            epoch += 1
            clock.start()
            for step in loader.epoch(epoch):
                (batch,) = step.micro_batches
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(batch.images), batch.labels))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
            yield clock.stop()

    def _training(self, folder: Path) -> tuple[Training, Turns]:
        options, accelerator = self.options, self.accelerator
        backbone = make_backbone(options).to(accelerator.device)
        scope = scope_parameters(backbone)
        self.parameters = sum(p.numel() for p in scope.values())
        space = VectorSpace.of(scope)
        heads = [make_head(backbone.feature_dim, CLASSES, seed).to(accelerator.device) for seed in (0, 1)]
        chosen = heads if self.method.all_heads else heads[1:]
        for head in chosen[:-1]:
            head.requires_grad_(False)
        model = TaskModel(backbone, chosen)
        context = self._context(model, scope, space)
        remember(self.method, context, scope)
        log = RunLog(folder, accelerator)
        observer = Turns(Progress(False), log, "bench", 0)
        phase = Phase(
            accelerator=accelerator,
            optimization=self.optimization,
            observer=observer,
            method=self.method,
            context=context,
            scope=tuple(scope),
            log_every=options.log_every,
        )
        loader = self._loader()
        training = Training(model, loader, phase)
        self._time_parts(training, loader, observer)
        return training, observer

    def _time_parts(self, training: Training, loader: TaskLoader, observer: Turns) -> None:
        parts, epoch = self.parts, loader.epoch
        parts.around(training.clock, "passes", "passes")
        parts.around(self.method, "gradients", "gradients")
        parts.around(self.method, "step", "step")
        parts.around_step(training.optimizer.optimizer)
        parts.around(observer, "step_taken", "log")

        def timed_epoch(*arguments: Any) -> Iterator[Any]:
            steps = epoch(*arguments)
            while True:
                with parts.of("loader"):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        loader.epoch = timed_epoch  # type: ignore[method-assign]
        observer.clock = self.clock

    def _context(self, model: TaskModel, scope: dict[str, nn.Parameter], space: VectorSpace) -> TaskContext:
        images = self.images.datasets[0]
        task = Task(2, "bench", "noise", tuple(images.classes), images, images, (), "none", "made", "bench")
        view = View(self.images.resizing, (0.5,) * 3, (0.5,) * 3, self.accelerator.device)

        def samples(count: int, batch_size: int | None = None) -> list[Batch]:
            rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
            return curvature_batches(
                self.images, view, name="bench", num_samples=count, batch_size=batch_size or 8, seed=0, rank=rank,
                world_size=world_size,
            )  # fmt: skip

        return TaskContext(
            index=2, tasks=[task, task], num_tasks=2, model=model, parameters=scope, space=space, objective=Objective(),
            accelerator=self.accelerator, curvature=CurvatureOptions(), seed=0, head=len(model.heads) - 1, image_bytes=0,
            samples=samples, loader=no_exemplars,
        )  # fmt: skip


@dataclass
class Turns(PhaseObserver):
    """The product's own observer, which lets the plain loop have its turn after each epoch."""

    between: Callable[[int], None] = lambda number: None
    clock: Clock | None = None

    def phase_started(self, epochs: int, steps_per_epoch: int, taken: int) -> None:
        super().phase_started(epochs, steps_per_epoch, taken)
        assert self.clock is not None
        self.clock.start()

    def epoch_finished(self, epoch: int, step: int, model: nn.Module, metrics: dict[str, float]) -> None:
        super().epoch_finished(epoch, step, model, metrics)
        self.between(epoch)


@contextmanager
def clip_timed(parts: PartTimes) -> Iterator[None]:
    original = step_module.clip_gradients
    parts.around(step_module, "clip_gradients", "clip")
    try:
        yield
    finally:
        step_module.clip_gradients = original


def make_backbone(options: argparse.Namespace) -> Any:
    words = dict(MODELS[NETWORKS[options.network]])
    if options.image_size is not None:
        words["image_size"] = options.image_size
    backbone = build_backbone(pretrained=False, seed=options.seed, **words)
    if options.lora:
        attach_lora(backbone, r=8, alpha=16, seed=options.seed)
    return backbone


def remember(method: Method, context: TaskContext, scope: dict[str, nn.Parameter]) -> None:
    """Give the method what it would hold after one task."""
    eigenspace = getattr(method, "eigenspace", None)
    if eigenspace is not None:
        rows = cosine_memory(scope, method.config.top_k, context.space.dtype)
        assert rows.basis is not None
        memory = eigenspace.make(context.space, context.num_tasks)
        memory.load(context.space.slice_flat(rows.basis), rows.eigenvalues, 1, context.space)
    elif getattr(method, "tail", None) is not None:
        method.tail.end(context)  # type: ignore[attr-defined]


def no_exemplars(exemplars: Any) -> Any:
    raise UsageError("methods of bench.step store no exemplars")


def _table(rows: Sequence[dict[str, Any]], options: argparse.Namespace, world_size: int) -> Any:
    what = f"{options.network}, {'LoRA' if options.lora else 'whole'}, {rows[0]['parameters']:,} parameters in scope"
    title = f"Milliseconds a step: {what}, {world_size} x {options.batch_size} images, {options.precision}"
    result = common.table(title, ["method", "plain", "step", "ratio", "least", "greatest", *PARTS])
    for row in rows:
        parts = dict(row["parts_ms"])
        parts["step"] -= parts["optimizer"]
        low, high = row["ratio_range"]
        result.add_row(
            row["method"],
            f"{row['plain_ms']:.2f}",
            f"{row['step_ms']:.2f}",
            f"{row['ratio']:.3f}",
            f"{low:.3f}",
            f"{high:.3f}",
            *(f"{parts[part]:.2f}" for part in PARTS),
        )
    return result


if __name__ == "__main__":
    main()
