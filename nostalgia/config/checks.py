"""What values the configuration allows: choices, ranges, and choices that exclude each other."""

from __future__ import annotations

import math
import re
from typing import Any

from nostalgia.config.schema import Config
from nostalgia.errors import UsageError

CHOICES: dict[str, tuple[str, ...]] = {
    "experiment.split": ("none", "classes"),
    "dataset.augment": ("default", "none", "flip", "crop_flip", "shift"),
    "model.framework": ("hf", "torchvision"),
    "model.norm_statistics": ("per_task", "frozen", "shared"),
    "method.name": ("nostalgia", "finetune", "joint"),
    "nostalgia.merge": ("union", "average"),
    "nostalgia.project": ("constrained", "displacement", "gradient"),
    "nostalgia.project_params": ("auto", "backbone", "lora-only"),
    "nostalgia.curvature": ("hessian", "ggn"),
    "nostalgia.hvp": ("exact", "jvp", "finite_difference"),
    "nostalgia.precision": ("float32", "float64", "tf32", "bf16"),
    "nostalgia.retain_graph": ("auto", "true", "false"),
    "nostalgia.predict_forgetting": ("auto", "true", "false"),
    "nostalgia.basis_placement": ("auto", "replicated", "sharded"),
    "nostalgia.basis_dtype": ("float32", "bfloat16"),
    "train.optimizer": ("adamw", "sgd"),
    "train.scheduler": ("cosine", "constant"),
    "train.precision": ("auto", "64", "32", "tf32", "bf16", "16"),
    "train.on_checkpoint_failure": ("stop", "continue"),
    "train.accelerator": ("auto", "cpu", "gpu"),
    "logger.mode": ("online", "offline", "disabled"),
}

OWN_METHOD = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class

# key: (least, greatest, whether the least itself is allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "experiment.num_tasks": (1, math.inf, True),
    "experiment.seed": (0, 2**32 - 1, True),
    "dataset.image_size": (1, 4096, True),
    "dataset.batch_size": (1, math.inf, True),
    "dataset.num_workers": (0, 256, True),
    "dataset.val_fraction": (0, 0.9, False),
    "model.lora.r": (1, math.inf, True),
    "model.lora.alpha": (1, math.inf, True),
    "model.lora.dropout": (0, 0.99, True),
    "nostalgia.top_k": (1, math.inf, True),
    "nostalgia.k_max": (1, math.inf, True),
    "nostalgia.projection_start_task": (1, math.inf, True),
    "nostalgia.num_samples": (1, math.inf, True),
    "nostalgia.batch_size": (1, math.inf, True),
    "nostalgia.tol": (0, 1, False),
    "nostalgia.max_products": (1, math.inf, True),
    "nostalgia.max_basis": (1, math.inf, True),
    "nostalgia.basis_memory_gb": (0, math.inf, True),
    "nostalgia.guard_every_n_steps": (0, math.inf, True),
    "nostalgia.trace_samples": (1, math.inf, True),
    "nostalgia.density_runs": (1, math.inf, True),
    "nostalgia.density_steps": (1, math.inf, True),
    "train.epochs": (1, math.inf, True),
    "train.lr": (0, math.inf, False),
    "train.weight_decay": (0, math.inf, True),
    "train.momentum": (0, 0.9999, True),
    "train.warmup_epochs": (0, math.inf, True),
    "train.head_warmup_epochs": (0, math.inf, True),
    "train.head_warmup_lr": (0, math.inf, False),
    "train.gradient_accumulation_steps": (1, math.inf, True),
    "train.max_grad_norm": (0, math.inf, False),
    "train.label_smoothing": (0, 0.99, True),
    "train.heartbeat_seconds": (0, math.inf, True),
    "train.log_every_n_steps": (1, math.inf, True),
    "train.timeout_minutes": (0, math.inf, False),
    "train.checkpoint_every_steps": (0, math.inf, True),
    "train.checkpoint_every_epochs": (0, math.inf, True),
    "train.keep_checkpoints": (1, math.inf, True),
    "nostalgia.checkpoint_every_n_products": (0, math.inf, True),
    "train.max_steps_per_epoch": (1, math.inf, True),
    "train.max_eval_batches": (1, math.inf, True),
}


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Raise UsageError for the first value that is not allowed, naming key, value, what is allowed and the remedy."""
    for key, allowed in CHOICES.items():
        if key == "method.name" and OWN_METHOD.fullmatch(config.method.name):
            continue
        if value_at(config, key) not in allowed:
            raise UsageError(f"{key}={value_at(config, key)}: allowed are {', '.join(allowed)}")
    for key, (least, greatest, inclusive) in RANGES.items():
        value = value_at(config, key)
        if value is None:
            continue
        inside = (value >= least if inclusive else value > least) and value <= greatest
        if not inside or math.isinf(value):
            raise UsageError(f"{key}={value}: allowed is {_range_text(least, greatest, inclusive)}")
    _check_name(config)
    _check_betas(config)
    _check_tasks(config)
    _check_conflicts(config)


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
    greatest = int(RANGES["experiment.seed"][1]) + 1 - world_size  # each rank's own is the seed plus its number
    if config.experiment.seed > greatest:
        raise UsageError(
            f"experiment.seed={config.experiment.seed}: allowed with {world_size} processes is 0 or more, up to "
            f"{greatest}"
        )
    precision = config.train.precision
    if precision == "16" and device_type == "cpu":
        raise UsageError("train.precision=16 needs a GPU (on CPU it would silently be 32); use bf16 or 32")
    if precision == "auto":
        return "16" if device_type == "cuda" else "32"
    return precision


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
    count = len(tasks) if tasks is not None else experiment.num_tasks or 2
    start, projects = config.nostalgia.projection_start_task, config.nostalgia.enabled
    if config.method.name == "nostalgia" and projects and start > max(count, 2):
        raise UsageError(
            f"nostalgia.projection_start_task={start}, but there are {count} tasks: nothing would be projected; "
            f"allowed is 1 to {max(count, 2)}, or use method=finetune"
        )
    if train.epochs_per_task is not None:
        if len(train.epochs_per_task) != count:
            raise UsageError(
                f"train.epochs_per_task={train.epochs_per_task} has {len(train.epochs_per_task)} entries for "
                f"{count} tasks; give one a task"
            )
        if min(train.epochs_per_task) < 1:
            raise UsageError(f"train.epochs_per_task={train.epochs_per_task}: allowed is 1 or more each")


def _check_conflicts(config: Config) -> None:
    nostalgia, model = config.nostalgia, config.model
    if nostalgia.k_max is not None and nostalgia.k_max < nostalgia.top_k:
        raise UsageError(
            f"nostalgia.k_max={nostalgia.k_max} is below nostalgia.top_k={nostalgia.top_k}; raise it or leave it null"
        )
    if nostalgia.max_basis is not None and nostalgia.max_basis < nostalgia.top_k + 2:
        raise UsageError(
            f"nostalgia.max_basis={nostalgia.max_basis}: allowed is nostalgia.top_k + 2 = {nostalgia.top_k + 2} or more"
        )
    if nostalgia.max_products is not None and nostalgia.max_products < nostalgia.top_k:
        raise UsageError(
            f"nostalgia.max_products={nostalgia.max_products}: allowed is nostalgia.top_k = {nostalgia.top_k} or more"
        )
    if nostalgia.merge == "average" and nostalgia.k_max is not None:
        raise UsageError(
            f"nostalgia.k_max={nostalgia.k_max} bounds nostalgia.merge=union; average holds top_k = {nostalgia.top_k} "
            "directions: leave k_max null, or choose union"
        )
    if nostalgia.curvature == "ggn" and nostalgia.hvp == "finite_difference":
        raise UsageError("nostalgia.hvp=finite_difference is for nostalgia.curvature=hessian; ggn allows exact and jvp")
    if nostalgia.compile and nostalgia.hvp != "jvp":
        raise UsageError(f"nostalgia.compile=true compiles nostalgia.hvp=jvp; it is {nostalgia.hvp}")
    if nostalgia.predict_forgetting == "true" and config.method.name == "joint":
        raise UsageError(
            "nostalgia.predict_forgetting=true with method=joint: no task ends before another begins; use auto or false"
        )
    if nostalgia.project_params == "lora-only" and not model.use_lora:
        raise UsageError(
            "nostalgia.project_params=lora-only without adapters: set model.use_lora=true, or project_params=backbone"
        )
    if model.framework == "torchvision" and model.arch is None:
        raise UsageError("model.framework=torchvision needs model.arch, such as model.arch=resnet50")
    if config.train.devices != "auto" and (not isinstance(config.train.devices, int) or config.train.devices < 1):
        raise UsageError(f"train.devices={config.train.devices}: allowed are auto and whole numbers from 1")


def _range_text(least: float, greatest: float, inclusive: bool) -> str:
    low = f"{least:g} or more" if inclusive else f"more than {least:g}"
    return f"a finite number, {low}" if math.isinf(greatest) else f"{low}, up to {greatest:g}"
