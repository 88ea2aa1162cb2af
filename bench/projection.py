"""What keeping steps out of span(Q) costs, against the time of reading Q."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import common
from bench.networks import MODELS, Classifier
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection import CurvatureMemory, GradientProjector

ABOUT = """\
Seconds and bytes of the gradient projection g - Q^T (Q g) and of the constrained step of AdamW, with Q (k, P) of
orthonormal rows, beside the least it can take: reading Q twice at the bandwidth that a plain read or copy of the
same memory reaches.

columns:
  Q             bytes of Q
  limit         seconds to read Q twice, measured: the faster of a sum and a copy (half its traffic is reading)
  gradient      seconds of GradientProjector.project_gradients; x limit: how many times the limit that is
  constrained   seconds that constrain_step takes beyond the optimizer's own step, the mean over a period of 10 steps, the
                first of which looks at the metric (m^2 P work); x gradient: beside the projection
  reads         how often each reads all of Q between two looks, counted call by call; together at most 4
  leak          part of the displacement inside span(Q) after all steps, |Q d| / |d|
"""
METRIC_EVERY = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parser(
        "projection",
        ABOUT,
        [
            "python -m bench.projection --out projection.json",
            "python -m bench.projection --device cuda --model vit_b16 --k 32   # P = 85.8M: 11 GB of Q",
            "python -m bench.projection --parameters 20000 --k 4 --repeats 2   # seconds",
        ],
    )
    common.add_device(arguments)
    common.add_clock(arguments)
    size = arguments.add_mutually_exclusive_group()
    size.add_argument("--parameters", type=int, default=1_000_000, help="P (default 1,000,000, in 48 tensors)")
    size.add_argument("--model", choices=list(MODELS), help="take P and the tensors of this network instead")
    arguments.add_argument("--k", default="32,128,256", help="rows of Q, several by commas (default 32,128,256)")
    arguments.add_argument("--dtypes", default="float32", help="of Q: float32, bfloat16 (default float32)")
    arguments.add_argument("--repeats", type=int, default=10, help="timed calls, of which the fastest (default 10)")
    common.run(benchmark, arguments, argv)


def benchmark(options: argparse.Namespace) -> None:
    device = common.pick_device(options.device)
    dtypes = common.choices(options.dtypes, list(DTYPES), "--dtypes")
    parameters = _parameters(options, device)
    size = sum(p.numel() for p in parameters.values())
    try:
        ranks = [int(k) for k in options.k.split(",")]
    except ValueError:
        raise UsageError(f"--k {options.k}: whole numbers by commas, such as 32,128") from None
    if min(ranks) < 1 or max(ranks) > size:
        raise UsageError(f"--k {options.k}: allowed is 1 to {size}, the number of parameters")
    timer = Timer(device, options.repeats, common.clock(options, device))
    rows = [measure(parameters, k, dtype, timer) for k in ranks for dtype in dtypes]
    results = {"benchmark": "projection", "parameters": size, "rows": rows}
    common.report(options, device, results, [_table(rows, size)])


@dataclass(frozen=True)
class Timer:
    device: torch.device
    repeats: int
    clock: common.Clock

    def __call__(self, call: Callable[[], Any]) -> float:
        return common.seconds(call, self.device, self.repeats, self.clock)


def measure(parameters: dict[str, nn.Parameter], k: int, dtype: str, timer: Timer) -> dict[str, Any]:
    """One row: Q of ``k`` rows in ``dtype`` over ``parameters``."""
    memory = cosine_memory(parameters, k, DTYPES[dtype])
    basis = memory.basis
    assert basis is not None
    projector = GradientProjector(memory, parameters, METRIC_EVERY)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator(device=timer.device).manual_seed(k)

    def new_gradients() -> None:
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator, device=p.device)

    new_gradients()
    limit = 2 * basis.numel() * basis.element_size() / bandwidth(basis, timer)
    gradient = timer(projector.project_gradients)
    plain = timer(optimizer.step)
    whole = timer(lambda: [projector.constrain_step(optimizer) for _ in range(METRIC_EVERY)]) / METRIC_EVERY
    reads = count_reads(basis, projector.project_gradients)
    projector.constrain_step(optimizer)  # the look at the metric
    constrained_reads = count_reads(basis, lambda: projector.constrain_step(optimizer))
    # The plain steps above left the complement: the leak is that of constrained ones alone.
    fresh = GradientProjector(memory, parameters, METRIC_EVERY)
    for _ in range(3):
        new_gradients()
        fresh.project_gradients()
        fresh.constrain_step(optimizer)
    constrained = whole - plain
    return {
        "k": k,
        "dtype": dtype,
        "basis_bytes": basis.numel() * basis.element_size(),
        "limit_seconds": limit,
        "gradient_seconds": gradient,
        "gradient_per_limit": gradient / limit,
        "step_seconds": plain,
        "constrained_seconds": constrained,
        "constrained_per_gradient": constrained / gradient,
        "gradient_reads": reads,
        "constrained_reads": constrained_reads,
        "leak": fresh.leak(),
    }


def cosine_memory(parameters: dict[str, nn.Parameter], k: int, dtype: torch.dtype) -> CurvatureMemory:
    """A memory of the first cosines over the flat parameters: dense orthonormal rows without a factorisation."""
    space = VectorSpace.of(parameters, placement="local")
    memory = CurvatureMemory(k, dtype=dtype)
    columns = torch.arange(space.size, dtype=torch.float64, device=space.device) + 0.5
    rows = torch.empty(k, space.size, dtype=space.dtype, device=space.device)
    for i, row in enumerate(rows, 1):
        row.copy_(torch.cos(columns * (math.pi * i / space.size)) * math.sqrt(2 / space.size))
    memory.load(rows, torch.arange(k, 0, -1, dtype=torch.float64), 1, space)
    return memory


def bandwidth(basis: Tensor, timer: Timer) -> float:
    """Bytes a second of the faster of a plain read and a plain copy of ``basis``."""
    size = basis.numel() * basis.element_size()
    flat, target = basis.view(-1), torch.empty_like(basis).view(-1)
    read = timer(flat.sum)
    copy = timer(lambda: target.copy_(flat))
    return max(size / read, 2 * size / copy)


class _Reads(TorchDispatchMode):
    """Bytes of one storage that go into operations; views read nothing."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.storage, self.bytes = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function.name() not in ("aten::detach", "aten::empty_like"):
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == self.storage:
                    self.bytes += value.numel() * value.element_size()
        return function(*args, **(kwargs or {}))


def count_reads(basis: Tensor, call: Callable[[], Any]) -> float:
    """How often ``call`` reads all of ``basis``."""
    with _Reads(basis) as reads:
        call()
    return reads.bytes / (basis.numel() * basis.element_size())


def _parameters(options: argparse.Namespace, device: torch.device) -> dict[str, nn.Parameter]:
    if options.model is not None:
        model = Classifier(options.model, options.seed).to(device)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    if options.parameters < 48:
        raise UsageError(f"--parameters {options.parameters}: allowed is 48 or more")
    generator = torch.Generator().manual_seed(options.seed)
    draws = torch.randn(options.parameters, generator=generator).to(device)
    return {f"tensor{i}": nn.Parameter(part.clone()) for i, part in enumerate(draws.tensor_split(48))}


def _table(rows: Sequence[dict[str, Any]], size: int) -> Any:
    columns = ["k", "dtype", "Q", "limit", "gradient", "x limit", "constrained", "x gradient", "reads", "leak"]
    result = common.table(f"Projection of {size} parameters, milliseconds", columns)
    for row in rows:
        result.add_row(
            str(row["k"]),
            row["dtype"],
            f"{row['basis_bytes'] / 2**20:.1f} MiB",
            f"{1e3 * row['limit_seconds']:.2f}",
            f"{1e3 * row['gradient_seconds']:.2f}",
            f"{row['gradient_per_limit']:.2f}",
            f"{1e3 * row['constrained_seconds']:.2f}",
            f"{row['constrained_per_gradient']:.2f}",
            f"{row['gradient_reads']:.2f} + {row['constrained_reads']:.2f}",
            f"{row['leak']:.1e}",
        )
    return result


if __name__ == "__main__":
    main()
