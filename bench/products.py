"""Curvature products: seconds of each method and precision, beside a gradient over the same samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench import common
from bench.networks import MODELS, Batch, Classifier, digits, forward_fn, loss_fn, split
from nostalgia.curvature import GGNOperator, HessianOperator
from nostalgia.curvature.base import BatchedOperator
from nostalgia.errors import RunFailedError, UsageError

ABOUT = """\
Products with the Hessian and the Gauss-Newton matrix of a network's loss on scikit-learn's digits: every method in
every precision of the device. Under torchrun each rank takes its share of the samples and of the vectors.

columns:
  ms            of a product over all --num-samples, the fastest of --repeats; a row "gradient" for each precision
  per gradient  a product's time over that of a gradient of the same precision
  products/s    the reciprocal of ms
  error         |H v - exact| / |exact|, exact in float64 by double backward
  collectives   of one product, counted: those of P numbers + those of a few; MiB is what they move on a rank (what
                FSDP2 does by itself in the two gradients of a finite difference is not among them)
  first         seconds of the first product: graphs kept, or the program compiled
Finite differences refuse to return noise; such a row says so. Everything is done in evaluation mode, attention in
the kernel that has a second derivative.
"""
PRECISIONS = {"cpu": ["float32", "float64", "bf16"], "cuda": ["float32", "tf32", "bf16", "float64"]}


@dataclass(frozen=True)
class Method:
    title: str
    operator: type[BatchedOperator]
    options: dict[str, Any]


METHODS = {
    "hessian": Method("Hessian, double backward", HessianOperator, {"method": "exact", "retain_graph": False}),
    "hessian_kept": Method("Hessian, graphs kept", HessianOperator, {"method": "exact", "retain_graph": True}),
    "hessian_jvp": Method("Hessian, jvp of grad", HessianOperator, {"method": "jvp"}),
    "hessian_compiled": Method("Hessian, jvp compiled", HessianOperator, {"method": "jvp", "compile": True}),
    "difference": Method("Hessian, finite difference", HessianOperator, {"method": "finite_difference"}),
    "ggn": Method("GGN, double backward", GGNOperator, {"method": "exact", "retain_graph": False}),
    "ggn_kept": Method("GGN, graphs kept", GGNOperator, {"method": "exact", "retain_graph": True}),
    "ggn_jvp": Method("GGN, jvp and vjp", GGNOperator, {"method": "jvp"}),
    "ggn_compiled": Method("GGN, jvp and vjp compiled", GGNOperator, {"method": "jvp", "compile": True}),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parser(
        "products",
        ABOUT,
        [
            "python -m bench.products --out products.json",
            "python -m bench.products --device cuda --model vit_b16 --num-samples 64 --batch-size 64",
            "torchrun --nproc_per_node 2 -m bench.products --methods hessian_kept,ggn_jvp",
            "torchrun --nproc_per_node 2 -m bench.products --fsdp",
            "python -m bench.products --num-samples 8 --methods hessian_jvp,ggn --repeats 1   # seconds",
        ],
    )
    common.add_device(arguments)
    common.add_clock(arguments)
    arguments.add_argument("--model", choices=list(MODELS), default="vit_tiny", help="(default vit_tiny)")
    arguments.add_argument("--num-samples", type=int, default=256, help="over all ranks (default 256)")
    arguments.add_argument("--batch-size", type=int, default=128, help="samples at once on a rank (default 128)")
    arguments.add_argument("--methods", default=",".join(METHODS), help=f"default: {','.join(METHODS)}")
    arguments.add_argument("--precisions", default="auto", help="float32,tf32,bf16,float64 (auto: the device's)")
    arguments.add_argument("--repeats", type=int, default=5, help="timed products, of which the fastest (default 5)")
    arguments.add_argument("--fsdp", action="store_true", help="shard the network by FSDP2 (under torchrun)")
    common.run(benchmark, arguments, argv)


def benchmark(options: argparse.Namespace) -> None:
    device = common.pick_device(options.device)
    methods = common.choices(options.methods, list(METHODS), "--methods")
    available = PRECISIONS[device.type]
    chosen = ",".join(available) if options.precisions == "auto" else options.precisions
    precisions = common.choices(chosen, available, "--precisions")
    rank, world_size = common.join_ranks(device)
    model = Classifier(options.model, options.seed).to(device)
    data = tuple(part.to(device) for part in digits(model.image_size, options.num_samples, options.seed))
    batches = split((data[0], data[1]), options.batch_size, rank, world_size)
    if options.fsdp:
        shard(model, device)
    bench = Bench(model, batches, device, options.repeats, options.seed, common.clock(options, device))
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        gradient = bench.gradient(precision)
        rows += [gradient, *(bench.product(name, precision, gradient["seconds"]) for name in methods)]
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    results = {"benchmark": "products", "parameters": size, "world_size": world_size, "rows": rows}
    if rank == 0:
        title = f"{options.model}, P = {size}, {options.num_samples} samples, {_ranks(world_size, options.fsdp)}"
        common.report(options, device, results, [_table(rows, title)])


class Bench:
    """Times products with one network on this rank's batches; all ranks do the same in step."""

    def __init__(
        self,
        model: Classifier,
        batches: list[Batch],
        device: torch.device,
        repeats: int,
        seed: int,
        clock: common.Clock,
    ) -> None:
        self.model, self.batches, self.device, self.seed = model, batches, device, seed
        self.repeats, self.clock = repeats, clock
        self.exact: dict[type[BatchedOperator], Tensor] = {}

    def gradient(self, precision: str) -> dict[str, Any]:
        """The row of the gradient in ``precision``."""
        operator = self._operator(METHODS["hessian"], precision)
        operator.gradient()
        before = operator.space.traffic.snapshot()
        operator.gradient()
        moved = operator.space.traffic.since(before)
        seconds = common.seconds(operator.gradient, self.device, self.repeats, self.clock, warmup=0)
        return {
            "method": "gradient",
            "title": "gradient",
            "precision": precision,
            "seconds": self._slowest(seconds),
            "collectives": [moved.large, moved.small],
            "bytes": moved.bytes,
        }

    def product(self, name: str, precision: str, gradient: float) -> dict[str, Any]:
        """The row of a method in ``precision``; ``gradient`` is the seconds of that precision's gradient."""
        method = METHODS[name]
        row: dict[str, Any] = {"method": name, "title": method.title, "precision": precision}
        try:
            operator = self._operator(method, precision)
            v = operator.space.randn(self.seed).to(operator.space.dtype)
            v /= operator.space.norm(v)
            start = self.clock()
            result = operator.matvec(v)
            common.synchronise(self.device)
            row["first_seconds"] = self.clock() - start
            before = operator.space.traffic.snapshot()
            operator.matvec(v)
            moved = operator.space.traffic.since(before)
            seconds = common.seconds(lambda: operator.matvec(v), self.device, self.repeats, self.clock, warmup=0)
        except RunFailedError as reason:  # on all ranks alike
            return {**row, "refused": str(reason)}
        seconds = self._slowest(seconds)
        return {
            **row,
            "seconds": seconds,
            "products_per_second": 1 / seconds,
            "per_gradient": seconds / gradient,
            "error": self._error(method, v, result),
            "retained_batches": operator.retained,
            "collectives": [moved.large, moved.small],
            "bytes": moved.bytes,
        }

    def _operator(self, method: Method, precision: str) -> BatchedOperator:
        function = loss_fn if method.operator is HessianOperator else forward_fn
        return method.operator(self.model, function, self.batches, precision=precision, **method.options)

    def _error(self, method: Method, v: Tensor, result: Tensor) -> float:
        kind = METHODS["hessian" if method.operator is HessianOperator else "ggn"]
        operator = self._operator(kind, "float64")
        if method.operator not in self.exact:  # v is the same in all rows, up to rounding
            self.exact[method.operator] = operator.matvec(v.double())
        exact = self.exact[method.operator]
        return float(operator.space.norm(result.double() - exact) / operator.space.norm(exact))

    def _slowest(self, seconds: float) -> float:
        """The slowest rank's time."""
        if not dist.is_initialized():
            return seconds
        value = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)


def shard(model: Classifier, device: torch.device) -> None:
    """FSDP2 as Accelerate does it: each transformer layer a unit, then the whole."""
    if not dist.is_initialized():
        raise UsageError("--fsdp shards over ranks: start with torchrun --nproc_per_node N -m bench.products")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in ("ViTLayer", "BasicBlock"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _ranks(world_size: int, fsdp: bool) -> str:
    if world_size == 1:
        return "one process"
    return f"{world_size} ranks, {'FSDP2' if fsdp else 'sliced vectors'}"


def _table(rows: Sequence[dict[str, Any]], title: str) -> Any:
    columns = ["method", "precision", "ms", "per gradient", "products/s", "error", "collectives", "MiB", "first"]
    result = common.table(title, columns)
    for row in rows:
        if "refused" in row:
            result.add_row(row["title"], row["precision"], "refused: " + row["refused"].split(";")[0][:60])
            continue
        large, small = row["collectives"]
        result.add_row(
            row["title"],
            row["precision"],
            f"{1e3 * row['seconds']:.1f}",
            common.quantity(row.get("per_gradient")),
            common.quantity(row.get("products_per_second")),
            "-" if "error" not in row else f"{row['error']:.0e}",
            f"{large} + {small}",
            f"{row['bytes'] / 2**20:.2f}",
            common.quantity(row.get("first_seconds")),
        )
    return result


if __name__ == "__main__":
    main()
