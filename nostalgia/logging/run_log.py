"""The record of one run: which event writes what to which tracker, under one naming scheme."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from nostalgia.logging.csv_log import MEMORY_COLUMNS, CsvLog
from nostalgia.logging.log_position import log_position, rewind_logs, sync_logs
from nostalgia.logging.results import RunResults
from nostalgia.logging.trackers import Forgiving, Warn, make_trackers
from nostalgia.utils.nested import flatten

MEGABYTE = 2.0**20


class RunLog:
    """Writes metrics.csv, memory.csv, tensorboard/ and, where asked, Weights & Biases; rank 0 alone writes.

    ``step`` is the number of optimizer steps since the start of the run, over all tasks. With ``resume``,
    a position that `position` gave, what was logged after it is dropped and the logs go on. ``wandb``: options of
    `trackers.wandb_tracker`, None for no W&B. ``warn`` is told, in one line, of a tracker that failed.
    """

    def __init__(
        self,
        run_dir: Path,
        accelerator: Accelerator,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        save_dir: Path | None = None,
        config: Mapping[str, Any] | None = None,
        resume: Mapping[str, int] | None = None,
        warn: Warn = print,
    ) -> None:
        self.accelerator = accelerator
        self.config = flatten(config or {})
        self.step = 0
        if save_dir is not None:
            save_dir = own_folder(save_dir, run_dir)
        self._run_dir, self._tensorboard_root = run_dir, save_dir or run_dir
        self._warn = warn
        self._trackers: list[Forgiving] = []
        self._memory: CsvLog | None = None
        if accelerator.is_main_process:
            if resume is not None:
                rewind_logs(run_dir, self._tensorboard_root, resume)
            self._trackers = make_trackers(
                run_dir,
                warn,
                tensorboard=tensorboard,
                wandb=wandb,
                save_dir=save_dir,
                resume=resume is not None,
            )
            self._open_memory(run_dir / "memory.csv")
        accelerator.trackers = self._trackers
        for tracker in self._trackers if resume is None else ():
            tracker.store_init_configuration(self.config)

    def position(self) -> dict[str, int]:
        """How far the logs have come, for ``resume``; empty on ranks other than 0."""
        if not self.accelerator.is_main_process:
            return {}
        for tracker in self._trackers:
            tracker.flush()
        return log_position(self._run_dir, self._tensorboard_root)

    def sync(self) -> None:
        """See to it that what was logged is on the disk; may be called from another thread."""
        sync_logs(self._run_dir, self._tensorboard_root)

    def train_step(
        self,
        *,
        step: int,
        task: str,
        epoch: int,
        loss: float,
        accuracy: float | None = None,
        lr: float | None = None,
        grad_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
        images_per_s: float | None = None,
        split: str = "train",
    ) -> None:
        """A logged step; ``split`` is ``warmup`` while only the head trains; ``grad_norm`` unclipped.

        ``metrics`` are the method's own, for the trackers; two of them have columns in metrics.csv.
        """
        metrics = metrics or {}
        values = {
            f"{split}/loss": loss,
            f"{split}/accuracy": accuracy,
            f"{split}/lr": lr,
            f"{split}/grad_norm": grad_norm,
            f"{split}/images_per_s": images_per_s,
            f"{split}/epoch": epoch,
            **{f"method/{name}": value for name, value in metrics.items()},
        }
        row = {
            "task": task,
            "epoch": epoch,
            "split": split,
            "loss": loss,
            "accuracy": accuracy,
            "lr": lr,
            "grad_norm": grad_norm,
            "projected_fraction": metrics.get("projected_fraction"),
            "leak": metrics.get("leak"),
            "images_per_s": images_per_s,
        }
        self._log(values, step, row)

    def validation(
        self,
        *,
        step: int,
        task: str,
        epoch: int,
        loss: float,
        accuracy: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Validation of the task in training after an epoch, with the method's own ``metrics``."""
        leak = (metrics or {}).get("leak")
        own = {f"method/{name}": value for name, value in (metrics or {}).items()}
        values = {f"val/loss/{task}": loss, f"val/accuracy/{task}": accuracy, **own}
        row = {"task": task, "epoch": epoch, "split": "val", "loss": loss, "accuracy": accuracy, "leak": leak}
        self._log(values, step, row)

    def evaluation(
        self,
        *,
        step: int,
        tasks: Sequence[str],
        accuracies: Sequence[float],
        losses: Sequence[float] | None = None,
        class_incremental: Sequence[float | None] | None = None,
        split: str = "eval",
    ) -> None:
        """Accuracy on each task seen, after a task was trained: a row of the accuracy matrix.

        ``class_incremental``: the same with the task unknown. ``split`` is ``before`` for a task measured just before
        its training.
        """
        unknown = class_incremental if class_incremental is not None else [None] * len(tasks)
        per_task = zip(tasks, accuracies, losses if losses is not None else [None] * len(tasks), unknown, strict=True)
        for task, accuracy, loss, any_task in per_task:
            values = {
                f"{split}/accuracy/{task}": accuracy,
                f"{split}/loss/{task}": loss,
                f"{split}/class_incremental_accuracy/{task}": any_task,
            }
            row = {"task": task, "split": split, "accuracy": accuracy, "loss": loss}
            self._log(values, step, {**row, "class_incremental_accuracy": any_task})
        if split == "eval":
            self._log({"eval/accuracy_mean": sum(accuracies) / len(accuracies)}, step)
            known = [value for value in unknown if value is not None]
            if known:
                self._log({"eval/class_incremental_accuracy_mean": sum(known) / len(known)}, step)

    def curvature(
        self,
        task: str,
        eigenvalues: Sequence[float],
        *,
        residuals: Sequence[float] = (),
        products: int | None = None,
        seconds: float | None = None,
        memory_columns: int | None = None,
    ) -> None:
        """Eigenvalues of a finished task, by number from 1, and what they cost."""
        named = {f"curvature/{task}/eigenvalue_{i}": value for i, value in enumerate(eigenvalues, start=1)}
        worst = max(residuals, default=None)
        costs = {
            "products": products,
            "seconds": seconds,
            "worst_residual": worst,
            "memory_columns": memory_columns,
        }
        self._log({**named, **{f"curvature/{task}/{name}": value for name, value in costs.items()}}, self.step)

    def memory(self, step: int | None = None) -> None:
        """Memory of every rank now, in MiB; every rank must call this. GPU: the peak since the last call."""
        step = self.step if step is None else step
        sample = torch.tensor([memory_sample(self.accelerator.device)], device=self.accelerator.device)
        per_rank = self.accelerator.gather(sample).tolist()
        if self._memory is None:
            return
        values: dict[str, float] = {}
        try:
            for rank, (gpu, cpu) in enumerate(per_rank):
                row = {"time": round(time.time(), 2), "step": step, "rank": rank}
                self._memory.write({**row, "gpu_mem_mb": round(gpu, 1), "cpu_mem_mb": round(cpu, 1)})
                values |= {f"memory/rank{rank}/gpu_mb": gpu, f"memory/rank{rank}/cpu_mb": cpu}
        except OSError as error:
            self._memory = None
            self._warn(f"memory.csv stopped, the run goes on without it: {error}")
        self._log(values, step)

    def figures(self, paths: Mapping[str, Path]) -> None:
        """Hand figures (PNG, by name) to the trackers that show pictures."""
        if not self._trackers:
            return
        from matplotlib.image import imread

        for name, path in paths.items():
            image = (imread(path)[None, :, :, :3] * 255).astype("uint8")  # (1, H, W, 3)
            for tracker in self._trackers:
                tracker.log_images({f"figures/{name}": image}, step=self.step)

    def finish(self, results: RunResults | None = None) -> None:
        """Leave the results with the trackers (None: the run ended early) and close them."""
        metrics = {} if results is None else {k: v for k, v in results.metrics().items() if v is not None}
        for tracker in self._trackers:
            if metrics:
                tracker.store_summary(self.config, metrics)
            tracker.finish()
        if self._memory is not None:
            self._memory.close()
        self.accelerator.trackers, self._trackers, self._memory = [], [], None

    def _log(self, values: Mapping[str, float | None], step: int, row: Mapping[str, Any] | None = None) -> None:
        self.step = max(self.step, step)
        known = {name: float(value) for name, value in values.items() if value is not None}
        self.accelerator.log(known, step=step, log_kwargs={"csv": {"row": row}})

    def _open_memory(self, path: Path) -> None:
        try:
            self._memory = CsvLog(path, MEMORY_COLUMNS)
        except (OSError, ValueError) as error:
            self._warn(f"memory.csv cannot be written, the run goes on without it: {error}")


def own_folder(save_dir: Path, run_dir: Path) -> Path:
    """The run's own folder below a folder that several runs write to: nothing of another run is ever touched."""
    place = run_dir.resolve()
    digest = hashlib.blake2s(str(place).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return save_dir / f"{place.parent.name}_{place.name}_{digest}"


def memory_sample(device: torch.device) -> tuple[float, float]:
    """MiB of this process: GPU memory allocated at most since the last call (0 on CPU), resident memory."""
    resident = psutil.Process(os.getpid()).memory_info().rss / MEGABYTE
    if device.type != "cuda":
        return 0.0, resident
    peak = torch.cuda.max_memory_allocated(device) / MEGABYTE
    torch.cuda.reset_peak_memory_stats(device)
    return peak, resident
