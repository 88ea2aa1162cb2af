"""Time and memory of a rank, by stage, on any number of GPUs: counted bytes and operations over stated rates.

What is counted is exact: parameters, operations of a forward pass, numbers kept for the backward pass, bytes of collectives.
What is stated are the rates of `Cluster`, whose defaults were measured, and three constants of this file, which say how many
forward passes a backward pass and a curvature product take. Computing and communicating overlap in a step and do not in a
product. All bytes are those of float32; under autocast activations take half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nostalgia.logging.progress import duration
from nostalgia.utils.counts import products_of, steps_per_epoch
from nostalgia.utils.sizes import num_bytes

BACKWARD = 2.0  # forward passes: gradients of inputs and of weights
PRODUCT = 6.0  # of a curvature product: forward, and a derivative in each direction, each with its own backward pass
READS = 4  # of the basis in a constrained step: Q g, Q^T c, Q d, Q^T c
NUMBER = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines. Rates are those a program reaches, not those of a data sheet."""

    gpus: int = 1  # in all
    nodes: int = 1
    sharded: bool = False  # FSDP2; else DDP
    teraflops: float = (
        80.0  # of training passes: ViT-B/16, bf16, batch 32, one H200 (bench/results/step_vit_b_whole_gpu.json)
    )
    vector_teraflops: float = 40.0  # of float32 products: the Kronecker penalty of the same file
    memory_rate: float = 2000.0  # GB/s of a matrix times one vector: the projection of the same file
    link_rate: float = 300.0  # GB/s a GPU, within a node
    network_rate: float = 25.0  # GB/s a GPU, between nodes
    memory: float = 80.0  # GB a GPU

    @property
    def slowest_rate(self) -> float:
        """Bytes a second a GPU sends and receives in a ring over all."""
        return (self.network_rate if self.nodes > 1 else self.link_rate) * 1e9

    def ring(self, numbers: int) -> int:
        """Bytes a rank sends in an all-gather or a reduce-scatter of ``numbers``; an all-reduce is both."""
        return round(NUMBER * numbers * (self.gpus - 1) / self.gpus)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run asks for; counts are of numbers, images and tasks."""

    parameters: int  # of backbone and one head
    trained: int
    scope: int  # P: what the method protects
    largest_unit: int  # parameters of the largest part that FSDP2 gathers at a time
    forward_flops: float  # of one image
    activation_numbers: int  # of one image, kept for the backward pass
    mixed_precision: bool
    optimizer_states: int
    batch: int  # of a rank
    images: tuple[int, ...]  # of each epoch of each task
    tasks: int
    max_steps: int | None = None  # an epoch
    accumulation: int = 1  # micro-batches of a step
    top_k: int = 0  # 0: no eigensolve
    columns: int = 0  # of the memory at most
    samples: int = 0  # of an eigensolve
    rows_per_sample: int = 0  # of an eigensolve by rows; 0: by Lanczos
    curvature_batch: int = 1  # of a rank, in factors and products
    factor_numbers: int = 0  # of one task; 0: no factors
    factor_terms: int = 0  # kept at most: one a task, or one for all
    factor_samples: int = 0
    draws: int = 0
    penalty_flops: float = 0.0  # of a step, a task remembered
    curved: int = 0  # tasks whose curvature is taken

    def passes(self, gpus: int) -> int:
        """Micro-batches that a rank trains on in the run."""
        most = None if self.max_steps is None else self.max_steps * self.accumulation
        return sum(steps_per_epoch(images, self.batch * gpus, most) for images in self.images)

    @property
    def activation_bytes(self) -> int:
        return self.activation_numbers * (NUMBER // 2 if self.mixed_precision else NUMBER)


@dataclass(frozen=True)
class Stage:
    """One stage on one rank. ``count``: how often in the run."""

    name: str
    count: int
    compute_seconds: float  # each
    communication_seconds: float
    bytes_sent: int
    memory_bytes: int  # held at once
    overlaps: bool = False

    @property
    def seconds(self) -> float:
        both = (self.compute_seconds, self.communication_seconds)
        return max(both) if self.overlaps else sum(both)


def stages(load: Load, cluster: Cluster) -> list[Stage]:
    """The stages of a run, in their order within a task."""
    found = [_step(load, cluster)]
    if load.factor_numbers:
        found.append(_factors(load, cluster))
    if load.top_k:
        found.append((_rows if load.rows_per_sample else _products)(load, cluster))
    found.append(_checkpoint(load, cluster))
    return found


def _share(numbers: int, cluster: Cluster) -> int:
    return math.ceil(numbers / cluster.gpus) if cluster.sharded else numbers


def _remembered_bytes(load: Load, cluster: Cluster) -> int:
    """Of the method, a rank: directions spread over ranks, factors on every one."""
    return NUMBER * (math.ceil(load.columns * load.scope / cluster.gpus) + load.factor_numbers * load.factor_terms)


def _step(load: Load, cluster: Cluster) -> Stage:
    passes = 1 + BACKWARD * (0.5 + 0.5 * load.trained / load.parameters)  # frozen weights need no gradient of their own
    compute = passes * load.forward_flops * load.batch / (cluster.teraflops * 1e12)
    columns = load.columns / 2  # on average: the memory grows with the tasks
    read = READS * NUMBER * columns * load.scope / cluster.gpus / (cluster.memory_rate * 1e9)
    penalty = load.penalty_flops * (1 + load.factor_terms) / 2 / (cluster.vector_teraflops * 1e12)
    if cluster.sharded:
        sent = 2 * cluster.ring(load.parameters) + cluster.ring(load.trained)
        held = _share(load.parameters + load.trained * (1 + load.optimizer_states), cluster) + 2 * load.largest_unit
    else:
        sent = 2 * cluster.ring(load.trained)
        held = load.parameters + load.trained * (2 + load.optimizer_states)  # a gradient, and DDP's bucket of it
    memory = NUMBER * held + load.batch * load.activation_bytes + _remembered_bytes(load, cluster)
    return Stage(
        "step",
        load.passes(cluster.gpus),
        compute + read + penalty,
        sent / cluster.slowest_rate,
        sent,
        memory,
        overlaps=True,
    )


def _factors(load: Load, cluster: Cluster) -> Stage:
    passes = 1 + load.draws * BACKWARD / 2
    compute = passes * load.forward_flops * load.factor_samples / cluster.gpus / (cluster.teraflops * 1e12)
    sent = 2 * cluster.ring(load.factor_numbers)
    held = load.parameters + _share(load.parameters, cluster) + 2 * load.factor_numbers
    batch = min(load.curvature_batch, math.ceil(load.factor_samples / cluster.gpus))
    memory = NUMBER * held + batch * load.activation_numbers * NUMBER + _remembered_bytes(load, cluster)
    return Stage("Kronecker factors", load.curved, compute, sent / cluster.slowest_rate, sent, memory)


def _products(load: Load, cluster: Cluster) -> Stage:
    products = products_of(load.top_k)
    compute = PRODUCT * load.forward_flops * load.samples / cluster.gpus / (cluster.teraflops * 1e12)
    sent = 2 * cluster.ring(load.scope)  # gathers the vector, scatters the sum
    rows = 2 * load.top_k + 18  # of Lanczos
    vectors = math.ceil(rows * load.scope / cluster.gpus) + 2 * load.scope  # and one product's, whole
    held = load.parameters + _share(load.parameters, cluster) + vectors
    batch = min(load.curvature_batch, math.ceil(load.samples / cluster.gpus))
    memory = NUMBER * held + 2 * batch * load.activation_numbers * NUMBER + _remembered_bytes(load, cluster)
    return Stage("curvature product", load.curved * products, compute, sent / cluster.slowest_rate, sent, memory)


def _rows(load: Load, cluster: Cluster) -> Stage:
    """All gradients of an eigensolve by rows, each sent to the ranks that hold its parts."""
    passes = 1 + load.rows_per_sample * BACKWARD / 2
    compute = passes * load.forward_flops * load.samples / cluster.gpus / (cluster.teraflops * 1e12)
    numbers = load.samples * load.rows_per_sample * load.scope
    sent = cluster.ring(math.ceil(numbers / cluster.gpus))
    held = load.parameters + _share(load.parameters, cluster) + math.ceil(numbers / cluster.gpus)
    batch = min(load.curvature_batch, math.ceil(load.samples / cluster.gpus))
    memory = NUMBER * held + batch * load.activation_numbers * NUMBER + _remembered_bytes(load, cluster)
    return Stage("gradients by rows", load.curved, compute, sent / cluster.slowest_rate, sent, memory)


def _checkpoint(load: Load, cluster: Cluster) -> Stage:
    """Gathered to rank 0, which holds it whole in its host's memory."""
    whole = load.trained * (1 + load.optimizer_states)
    sent = cluster.ring(whole) if cluster.sharded else 0
    memory = NUMBER * (whole + load.columns * load.scope + load.factor_numbers * load.factor_terms)
    return Stage("checkpoint", load.tasks, 0.0, sent / cluster.slowest_rate, sent, memory)


def table(load: Load, cluster: Cluster, found: Sequence[Stage]) -> Group:
    """The plan for people, at most 100 columns wide."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("stage", no_wrap=True)
    for name in ("times", "computes", "communicates", "sends", "together", "memory"):
        shown.add_column(name, justify="right", no_wrap=True)
    for stage in found:
        computes, communicates = (_short(s) for s in (stage.compute_seconds, stage.communication_seconds))
        together, memory = duration(stage.count * stage.seconds), num_bytes(stage.memory_bytes)
        shown.add_row(
            stage.name, f"{stage.count:,}", computes, communicates, num_bytes(stage.bytes_sent), together, memory
        )
    most = max(stage.memory_bytes for stage in found if stage.name != "checkpoint")
    fits = "fits" if most <= cluster.memory * 1e9 else "does not fit"
    strategy = "FSDP2" if cluster.sharded else "DDP"
    lines = [
        f"{_counted(cluster.gpus, 'GPU')} on {_counted(cluster.nodes, 'node')}, {strategy}, {load.batch} images a "
        f"GPU: {fits}, {num_bytes(most)} of {cluster.memory:g} GB a GPU; checkpoints are in the host's memory",
        f"{load.parameters:,} parameters, {load.trained:,} trained, {load.scope:,} in scope; an image takes "
        f"{load.forward_flops / 1e9:.3g} GFLOP forward and {num_bytes(load.activation_bytes)} for the backward pass",
        f"at {cluster.teraflops:g} TFLOP/s, {cluster.memory_rate:g} GB/s of products with vectors, {cluster.link_rate:g} GB/s "
        "within a node" + (f" and {cluster.network_rate:g} between nodes" if cluster.nodes > 1 else ""),
    ]
    return Group(shown, *(Text(line) for line in lines))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
