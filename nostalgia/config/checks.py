"""What values the configuration allows: choices, ranges, and choices that exclude each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from nostalgia.config.schema import Config
from nostalgia.errors import UsageError
from nostalgia.options import check_options


def check(config: Config) -> None:
    """Raise UsageError for the first value that is not allowed, naming key, value, what is allowed and the remedy.

    The options of the method are checked by its own class, when it is made.
    """
    check_options(config, "")
    _check_name(config)
    _check_betas(config)
    _check_tasks(config)
    _check_conflicts(config)


def free_keys() -> frozenset[str]:
    """Keys that a resumed run may change: nothing that is computed depends on them but for rounding."""

    def walk(kind: Any, prefix: str) -> Iterator[str]:
        for item in fields(kind):
            value = item.default_factory() if item.default_factory is not MISSING else item.default
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{item.name}.")
            elif item.metadata.get("free") or prefix == "logger.":
                yield f"{prefix}{item.name}"

    return frozenset(walk(Config, ""))


def check_launch(config: Config, *, device_type: str, world_size: int) -> str:
    """Checks that need to know what was launched; returns the precision that ``train.precision`` stands for."""
    devices = config.train.devices
    if devices != "auto" and devices != world_size:
        command = (
            f"accelerate launch --num_processes {devices} -m nostalgia.train"
            if device_type == "cuda"
            else f"torchrun --nproc_per_node {devices} -m nostalgia.train"
        )
        raise UsageError(
            f"train.devices={devices}, but the launcher started {world_size}: the launcher decides; "
            f"start it as `{command} ...` or leave train.devices=auto"
        )
    greatest = 2**32 - world_size  # each rank's own is the seed plus its number
    if config.experiment.seed > greatest:
        raise UsageError(
            f"experiment.seed={config.experiment.seed}: allowed with {world_size} processes is 0 or more, up to "
            f"{greatest}"
        )
    precision = config.train.precision
    if precision == "16" and device_type == "cpu":
        raise UsageError("train.precision=16 needs a GPU (on CPU it would silently be 32); use bf16 or 32")
    return automatic_precision(device_type) if precision == "auto" else precision


def automatic_precision(device_type: str) -> str:
    """What ``train.precision=auto`` is here: bf16 on a GPU that computes in it, 16 on an older one, 32 on a CPU."""
    if device_type != "cuda":
        return "32"
    import torch  # here: reading a configuration needs it for nothing else

    # Of bf16 and float16, as fast as each other, bf16 has float32's range: no scaler, no step skipped for overflow.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"


def gpu_precision(config: Config) -> str:
    """What ``train.precision`` stands for on a GPU of today, whatever is at hand."""
    return "bf16" if config.train.precision == "auto" else config.train.precision


def _check_name(config: Config) -> None:
    """The name is a folder's under the output folder, and must not lead out of it."""
    name = config.experiment.name
    if not re.fullmatch(r"[\w.+ -]{1,100}", name) or name.strip(". ") == "" or name.startswith("-"):
        raise UsageError(
            f"experiment.name={name!r}: allowed is one folder's name of letters, digits, _ . + - and spaces; "
            "experiment.output_dir takes a path"
        )


def _check_betas(config: Config) -> None:
    betas = config.train.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise UsageError(f"train.betas={betas}: allowed are two numbers of at least 0 and below 1")


def _check_tasks(config: Config) -> None:
    experiment, train = config.experiment, config.train
    tasks = experiment.tasks
    if tasks is not None:
        if not tasks:
            raise UsageError("experiment.tasks=[]: name at least one task, such as experiment.tasks=[digits]")
        if experiment.num_tasks is not None and experiment.num_tasks != len(tasks):
            raise UsageError(
                f"experiment.num_tasks={experiment.num_tasks}, but experiment.tasks names {len(tasks)}; "
                "leave experiment.num_tasks out"
            )
        if experiment.split != "none":
            raise UsageError(
                f"experiment.split={experiment.split} splits one data set: it cannot go with experiment.tasks; "
                "use dataset=NAME experiment.num_tasks=N, or leave it out"
            )
    for key in ("head", "class_order"):
        value = getattr(experiment, key)
        if value not in ("per_task", None) and experiment.split != "classes":
            raise UsageError(f"experiment.{key}={value} goes with experiment.split=classes")
    count = len(tasks) if tasks is not None else experiment.num_tasks or 2
    if train.epochs_per_task is not None and config.method.get("name") == "joint":
        raise UsageError(
            f"train.epochs_per_task={train.epochs_per_task} with method=joint, which trains once on all tasks: give "
            "train.epochs"
        )
    if train.epochs_per_task is not None and len(train.epochs_per_task) != count:
        raise UsageError(
            f"train.epochs_per_task={train.epochs_per_task} has {len(train.epochs_per_task)} entries for "
            f"{count} tasks; give one a task"
        )


def _check_conflicts(config: Config) -> None:
    curvature, model = config.curvature, config.model
    if curvature.kind == "ggn" and curvature.hvp == "finite_difference":
        raise UsageError("curvature.hvp=finite_difference is for curvature.kind=hessian; ggn allows exact and jvp")
    if curvature.solver == "rows" and curvature.kind != "ggn":
        raise UsageError(
            f"curvature.solver=rows with curvature.kind={curvature.kind}: rows are of the Gauss-Newton matrix; set "
            "curvature.kind=ggn, or solver=lanczos"
        )
    if curvature.compile and curvature.hvp != "jvp":
        raise UsageError(f"curvature.compile=true compiles curvature.hvp=jvp; it is {curvature.hvp}")
    if config.analysis.predict_forgetting == "true" and config.method.get("name") == "joint":
        raise UsageError(
            "analysis.predict_forgetting=true with method=joint: no task ends before another begins; use auto or false"
        )
    if model.scope == "lora-only" and not model.use_lora:
        raise UsageError("model.scope=lora-only without adapters: set model.use_lora=true, or model.scope=backbone")
    for key, value in (("merge", model.lora.merge == "task"), ("freeze_a", model.lora.freeze_a)):
        if value and not model.use_lora:
            raise UsageError(f"model.lora.{key} without adapters: set model.use_lora=true, or leave it out")
    if model.framework == "torchvision" and model.arch is None:
        raise UsageError("model.framework=torchvision needs model.arch, such as model.arch=resnet50")
    if config.train.devices != "auto" and (not isinstance(config.train.devices, int) or config.train.devices < 1):
        raise UsageError(f"train.devices={config.train.devices}: allowed are auto and whole numbers from 1")
