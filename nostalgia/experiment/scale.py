"""``python -m nostalgia.plan``: what a run would take on other machines, from its network as it is built here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nostalgia.analysis.scale_model import Cluster, Load, stages, table
from nostalgia.config import Config
from nostalgia.curvature.layer_sides import layer_sides, penalty_flops
from nostalgia.data.tasks import Missing, Task, find_tasks
from nostalgia.errors import UsageError
from nostalgia.experiment.components import Components, build_components
from nostalgia.experiment.method_choice import complete_method, curvature_options
from nostalgia.experiment.task_data import placeholder, source_loader, task_specs
from nostalgia.logging.streams import make_console
from nostalgia.methods.base import MemoryPlan, Method
from nostalgia.methods.eigenspace import Eigenspace
from nostalgia.methods.tail import KroneckerTail
from nostalgia.models import Backbone
from nostalgia.parallel.accelerator import unsplit_layers
from nostalgia.training.optimizers import OPTIMIZERS


def print_plan(config: Config, cluster: Cluster, accelerator: Accelerator, precision: str, gpu_precision: str) -> None:
    """Print the plan of a run in ``gpu_precision``; its network is built here in ``precision``.

    Nothing is downloaded; NotFoundError where the network is not here.
    """
    complete_method(config)
    found = find_tasks(task_specs(config), source_loader(config, download=False), config.experiment.seed)
    tasks = [placeholder(one) if isinstance(one, Missing) else one for one in found]
    run = build_components(config, accelerator, precision, tasks=tasks, download_weights=False)
    load = load_of(run, gpu_precision)
    console = make_console()
    console.print(table(load, cluster, stages(load, cluster)))
    for line in uncounted(found):
        console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)


def uncounted(found: Sequence[Task | Missing]) -> list[str]:
    """A line that names the tasks whose steps a plan cannot count; none where there are none."""
    missing = [one.name for one in found if isinstance(one, Missing)]
    return [f"steps without those of {', '.join(missing)}, whose data is not on this machine"] if missing else []


def load_of(run: Components, precision: str) -> Load:
    """What the run asks of any machine, trained in ``precision`` there; its network runs forward once, with one image."""
    config, backbone = run.config, run.backbone
    flops, kept = forward_cost(backbone, run.view.resizing.size)
    classes = max((len(task.classes) for task in run.tasks), default=0)
    head = classes * (backbone.feature_dim + 1)
    parameters = list(backbone.parameters())
    scope = {name: p.shape for name, p in run.scope_parameters().items()}
    layers = unsplit_layers(backbone) or [backbone]
    curved = _curved(run)
    eigenspace, tail = getattr(run.method, "eigenspace", None), getattr(run.method, "tail", None)
    options = tail.options if isinstance(tail, KroneckerTail) else None
    sides = layer_sides(backbone, scope) if options is not None else []
    numbers = sum(o * o + i * i for o, i, _ in sides)
    kept_apart = options is not None and (options.budget_bytes is None or 4 * numbers * curved <= options.budget_bytes)
    columns = 0
    if isinstance(eigenspace, Eigenspace):
        columns = min(eigenspace.make(run.space, len(run.tasks)).capacity, max(1, curved) * eigenspace.config.top_k)
    return Load(
        parameters=sum(p.numel() for p in parameters) + head,
        trained=sum(p.numel() for p in parameters if p.requires_grad) + head,
        scope=run.space.size,
        largest_unit=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        forward_flops=flops,
        activation_numbers=kept,
        mixed_precision=precision in ("bf16", "16"),
        optimizer_states=OPTIMIZERS[config.train.optimizer].states,
        batch=config.dataset.batch_size,
        images=epochs_images(run),
        max_steps=config.train.max_steps_per_epoch,
        accumulation=config.train.gradient_accumulation_steps,
        tasks=len(run.tasks),
        top_k=eigenspace.config.top_k if isinstance(eigenspace, Eigenspace) else 0,
        columns=columns,
        samples=config.curvature.num_samples,
        rows_per_sample=config.curvature.rows_per_sample if curvature_options(config).takes_rows(run.space) else 0,
        curvature_batch=config.curvature.batch_size,
        factor_numbers=numbers,
        factor_terms=(curved if kept_apart else 1) if numbers else 0,
        factor_samples=0 if options is None else options.num_samples,
        draws=0 if options is None else options.draws,
        penalty_flops=math.fsum(penalty_flops(*side) for side in sides),
        curved=curved,
    )


def _curved(run: Components) -> int:
    """Tasks whose curvature is taken."""
    if run.method.joint:
        return 0
    return len(run.tasks) if run.config.curvature.last_task else len(run.tasks) - 1


def memory_plan(run: Components, method: Method) -> MemoryPlan:
    """What ``method`` keeps at most between tasks, with the Kronecker factors, whose size the network's layers decide."""
    plan, tail = method.memory_plan(run.space, len(run.tasks)), getattr(method, "tail", None)
    if not isinstance(plan, MemoryPlan):
        raise UsageError(f"method={method.name}: memory_plan returned {plan!r:.60}; allowed is a MemoryPlan")
    curved = _curved(run)
    if not isinstance(tail, KroneckerTail) or curved < 1:
        return plan
    sides = layer_sides(run.backbone, {name: p.shape for name, p in run.scope_parameters().items()})
    numbers = sum(o * o + i * i for o, i, _ in sides)
    covered = sum(r * (o + i) if r else o * i for o, i, r in sides)
    itemsize, terms = run.space.dtype.itemsize, curved
    if tail.options.budget_bytes is not None:
        terms = max(1, min(curved, tail.options.budget_bytes // max(1, itemsize * numbers)))
    # Beside the factors where the parameters were, and a diagonal for what is in no layer.
    own = max(0, 2 * run.space.size - covered)
    size = run.accelerator.num_processes * itemsize * (terms * numbers + own)
    words = [*([plan.text] if plan.text else []), f"Kronecker factors of {len(sides)} layers"]
    return MemoryPlan(plan.bytes + size, " and ".join(words))


def epochs_images(run: Components) -> tuple[int, ...]:
    """Training images of each epoch of the run, task by task; joint training takes those of all tasks in each."""
    if run.method.joint:
        return (sum(len(task.train) for task in run.tasks),) * run.epochs(run.tasks[0])
    return tuple(len(task.train) for task in run.tasks for _ in range(run.epochs(task)))


def forward_cost(backbone: Backbone, size: int) -> tuple[float, int]:
    """Floating-point operations of a forward pass of one image of ``size`` pixels, in training mode, and the numbers it keeps
    for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in (*backbone.parameters(), *backbone.buffers())}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = tensor.numel()
        return tensor

    first = next(backbone.parameters())
    images = torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device)
    was_training, fast = backbone.training, torch.backends.mha.get_fastpath_enabled()
    backbone.eval()  # batch norm takes one image, and dropout keeps little
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # one operator for all of nn.MultiheadAttention, which is not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            backbone(images)  # as products of matrices: not every kernel of attention is counted
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone(images)
    finally:
        backbone.train(was_training)
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops()), sum(seen.values())
