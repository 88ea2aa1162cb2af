"""What every benchmark does alike: its command line, the machine it names, timing, the JSON file and the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from nostalgia.errors import NostalgiaError, UsageError

Clock = Callable[[], float]


def parser(name: str, about: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A command line with what all benchmarks share; ``examples`` are complete commands."""
    result = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=about,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--out", type=Path, help="JSON file for the results (default: the table only)")
    result.add_argument("--seed", type=int, default=0, help="of weights, data and starting vectors (default 0)")
    result.add_argument("--threads", type=int, help="CPU threads torch may use (default: torch's own choice)")
    return result


def add_device(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")


def add_clock(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of this process on its processors, where others use the machine too (with --threads 1 what "
        "wall time would be on a machine left alone); default wall",
    )


def clock(options: argparse.Namespace, device: torch.device) -> Clock:
    if options.clock == "cpu" and device.type == "cuda":
        raise UsageError("--clock cpu: a GPU's time is not in it; use --clock wall")
    return time.perf_counter if options.clock == "wall" else time.process_time


def run(
    main: Callable[[argparse.Namespace], None], arguments: argparse.ArgumentParser, argv: Sequence[str] | None
) -> None:
    """Parse, run, and end with the project's exit code and one line where the user can help it."""
    options = arguments.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        main(options)
    except NostalgiaError as error:
        arguments.exit(error.exit_code, f"{arguments.prog}: {error}\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device for this rank; several ranks take several cards in turn, and share one where there is only one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: no CUDA device is visible here; use --device cpu")
        if ":" not in name:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def join_ranks(device: torch.device) -> tuple[int, int]:
    """(rank, world size); under torchrun the process group is started, by NCCL where every rank has its own card."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return 0, 1
    own_card = device.type == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    dist.init_process_group("nccl" if own_card else "gloo")
    return dist.get_rank(), world_size


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int, clock: Clock, warmup: int = 1) -> float:
    """Seconds of the fastest of ``repeats`` calls after ``warmup`` untimed ones."""
    times = []
    for number in range(warmup + repeats):
        synchronise(device)
        start = clock()
        call()
        synchronise(device)
        if number >= warmup:
            times.append(clock() - start)
    return min(times)


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software that numbers were taken on."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found


def origin() -> dict[str, Any]:
    """The command that is running, and the commit of the code (null outside a git checkout; ``+`` with changes to it)."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name] if module is not None else sys.argv[:1]
    return {"command": " ".join([*program, *sys.argv[1:]]), "commit": found.stdout.strip() or None}


def machine_line(device: torch.device) -> str:
    found = machine(device)
    threads = f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    return f"{found['device']}, {found['cpu_cores']} CPU cores, {threads}, torch {found['torch']}"


def report(
    options: argparse.Namespace, device: torch.device, results: dict[str, Any], tables: Sequence[Table | str]
) -> None:
    """Print ``tables`` and write the results, with settings and machine, to ``--out``."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    console.print(machine_line(device), highlight=False)
    for table in tables:
        console.print(table, highlight=False)
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            content = {"settings": settings, "machine": machine(device), **origin(), **results}
            options.out.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"--out {options.out}: cannot be written ({error.strerror})") from None
        console.print(f"written to {options.out}", highlight=False)


def table(title: str, columns: Sequence[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    return result


def quantity(value: float | None, digits: int = 3) -> str:
    """A number in few characters; a dash for one that does not exist."""
    return "-" if value is None else f"{value:.{digits}g}"


def choices(text: str, allowed: Sequence[str], flag: str) -> list[str]:
    """A comma-separated choice; raises UsageError naming what is allowed."""
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in chosen if part not in allowed]
    if wrong or not chosen:
        raise UsageError(f"{flag} {text}: {wrong[0] if wrong else 'nothing'} chosen; allowed are {', '.join(allowed)}")
    return chosen
