"""``python -m nostalgia.plan --suite main --gpus 64 --nodes 8``: time and memory a GPU of each stage, before any is booked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from nostalgia import config as configuration
from nostalgia.analysis.scale_model import Cluster
from nostalgia.command import run_command
from nostalgia.config import Config
from nostalgia.config.checks import gpu_precision
from nostalgia.errors import UsageError
from nostalgia.utils.arguments import CommandParser

EPILOG = """examples:
  python -m nostalgia.plan --suite main --gpus 64 --nodes 8
  python -m nostalgia.plan --suite cifar100_10 --gpus 8 --memory 40 dataset.batch_size=256 method=kronecker
  python -m nostalgia.plan --gpus 8 --strategy fsdp model.pretrained=false model.model_id=null model.use_lora=false \\
      '+model.config={model_type: vit, hidden_size: 1408, intermediate_size: 6144, num_hidden_layers: 40, num_attention_heads: 16, patch_size: 14}'

Bytes, operations and images are counted from the network as it is built here, on the CPU; nothing is downloaded or trained.
Times follow from the rates, whose defaults were measured on one H200 (bench/results/): give your own for other machines.
All other words are those of nostalgia.train. Exit codes as there.
"""  # noqa: E501


@dataclass(frozen=True)
class PlanRequest:
    """The run's configuration, and the machines it is planned for."""

    config: Config  # of what is built here, on the CPU
    cluster: Cluster
    precision: str  # that the run would have there


#: Flags of a number above 0, by the field of `Cluster` they set.
RATES = {
    "teraflops": ("--tflops", "TFLOP/s that training passes reach on a GPU"),
    "memory_rate": ("--memory-rate", "GB/s that a matrix times one vector reads"),
    "link_rate": ("--link", "GB/s a GPU within a node"),
    "network_rate": ("--network", "GB/s a GPU between nodes"),
    "memory": ("--memory", "GB of memory a GPU"),
}


def parse(argv: list[str]) -> PlanRequest:
    """Raises UsageError for a command line that cannot be meant."""
    parser = CommandParser(
        prog="nostalgia.plan",
        usage="python -m nostalgia.plan [--gpus N] [--nodes N] [--strategy ddp|fsdp] [--suite NAME] [KEY=VALUE ...]",
        description="Time and memory a GPU of each stage of a run, on machines that need not be here.",
        epilog=EPILOG,
    )
    parser.add_argument("--gpus", type=int, default=1, help="in all (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="that they are on (default 1)")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    for name, (flag, meaning) in RATES.items():
        default = getattr(Cluster, name)
        parser.add_argument(flag, dest=name, type=float, default=default, help=f"{meaning} (default {default:g})")
    flags, words = parser.parse_known_args(argv)
    if flags.gpus < 1 or flags.nodes < 1 or flags.gpus % flags.nodes:
        raise UsageError(f"--gpus {flags.gpus} --nodes {flags.nodes}: allowed is a whole number of GPUs a node")
    rates = {name: getattr(flags, name) for name in RATES}
    for name, rate in rates.items():
        if not rate > 0:
            raise UsageError(f"{RATES[name][0]} {rate:g}: allowed is a number above 0")
    cluster = Cluster(gpus=flags.gpus, nodes=flags.nodes, sharded=flags.strategy == "fsdp", **rates)
    config = configuration.parse([*words, "train.accelerator=cpu"]).config
    precision = gpu_precision(config)
    config.train.precision = "32"
    return PlanRequest(config, cluster, precision)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of `nostalgia.train`."""

    def run(request: PlanRequest, accelerator: Any, precision: str) -> None:
        from nostalgia.experiment.scale import print_plan

        print_plan(request.config, request.cluster, accelerator, precision, request.precision)

    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main())
