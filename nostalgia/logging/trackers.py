"""What a run records, through Accelerate's tracker interface: CSV, TensorBoard, Weights & Biases.

One naming scheme for all trackers: ``train/loss``, ``val/accuracy/<task>``, ``eval/accuracy/<task>``,
``curvature/<task>/eigenvalue_<i>``, ``method/leak``, ``memory/rank<r>/gpu_mb``. A tracker that fails says
so in one line and is left out from then on: no measurement is worth the training it was to watch.
"""

from __future__ import annotations

import secrets
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, on_main_process

from nostalgia.logging.csv_log import METRICS_COLUMNS, CsvLog
from nostalgia.utils.files import write_atomic

Warn = Callable[[str], None]
WANDB_START_SECONDS = 30.0  # a run without a network waits so long, once, and goes on without W&B
WANDB_FINISH_SECONDS = 120.0


class CsvTracker(GeneralTracker):
    """Writes metrics.csv: the row given to `log` beside its values."""

    name = "csv"
    requires_logging_directory = True

    def __init__(self, path: Path, columns: Sequence[str] = METRICS_COLUMNS) -> None:
        super().__init__()
        self.path, self.columns = path, columns

    @on_main_process
    def start(self) -> None:
        self.file = CsvLog(self.path, self.columns)

    @property
    def tracker(self) -> CsvLog:
        return self.file

    @on_main_process
    def log(
        self, values: dict[str, Any], step: int | None = None, row: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Write ``row`` as of ``step``; values without a row (eigenvalues, memory) are in other files."""
        if row is not None:
            check_there(self.path)
            self.file.write({"step": step, **row})

    @on_main_process
    def finish(self) -> None:
        self.file.close()


class TensorBoardLog(TensorBoardTracker):
    """Accelerate's tracker, which would file the configuration in a folder of its own without a metric."""

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in values.items()))

    @on_main_process
    def flush(self) -> None:
        self.writer.flush()

    @on_main_process
    def store_summary(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        """The run's line in the HPARAMS tab."""
        named = {f"result/{name}": value for name, value in metrics.items()}
        self.writer.add_hparams(config, named, run_name=".")
        self.writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        super().log_images(values, step=step, dataformats="NHWC", **kwargs)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        check_there(Path(self.logging_dir))
        super().log(values, step=step, **kwargs)


class WandBLog(WandBTracker):
    """Accelerate's tracker, with the run's results as its summary."""

    @on_main_process
    def store_summary(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        self.run.summary.update(metrics)


class Forgiving(GeneralTracker):
    """Passes calls on to ``tracker`` until one fails, which ``warn`` is told in one line."""

    requires_logging_directory = False

    def __init__(self, tracker: GeneralTracker, warn: Warn) -> None:
        super().__init__(_blank=True)
        self.name = tracker.name
        self._tracker, self._warn, self.failed = tracker, warn, False

    @property
    def tracker(self) -> Any:
        return self._tracker.tracker

    def start(self) -> None:
        self._try("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._try("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._try("log", values, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if hasattr(self._tracker, "log_images"):
            self._try("log_images", values, step=step, **kwargs)

    def store_summary(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        if hasattr(self._tracker, "store_summary"):
            self._try("store_summary", config, metrics)

    def flush(self) -> None:
        """Hand to the operating system what is written in the background."""
        if hasattr(self._tracker, "flush"):
            self._try("flush")

    def finish(self) -> None:
        self._try("finish")

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self._tracker, method)(*args, **kwargs)
        except tracker_errors() as error:
            self.failed = True
            self._warn(f"{self.name} tracker stopped, the run goes on without it: {one_line(error)}")


def tracker_errors() -> tuple[type[Exception], ...]:
    """What trackers raise when a disk, a network, an account or a package is not what they need."""
    errors: list[type[Exception]] = [OSError, RuntimeError, ValueError, ImportError]
    try:
        from wandb.errors import Error
    except ImportError:
        return tuple(errors)
    return (*errors, Error)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if text in ("", "<no message>"):
        text = type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def check_there(path: Path) -> None:
    """Raise OSError where a file or folder was taken away: what is written into it would be lost without a word."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there any more")


def wandb_tracker(
    run_dir: Path,
    *,
    project: str = "nostalgia",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    mode: str = "online",
    save_dir: Path | None = None,
    resume: bool = False,
) -> WandBLog:
    """Weights & Biases run, the same one when the run is resumed (its id is kept in the run folder).

    Raises ImportError without the package.
    """
    import wandb

    id_file = run_dir / "wandb_id.txt"
    known = resume and id_file.exists()
    run_id = id_file.read_text(encoding="utf-8").strip() if known else f"{run_dir.name}-{secrets.token_hex(3)}"
    write_atomic(id_file, run_id + "\n")
    folder = save_dir or run_dir
    folder.mkdir(parents=True, exist_ok=True)
    return WandBLog(
        project,
        id=run_id,
        resume="allow" if known and mode == "online" else None,
        entity=entity,
        name=name or run_dir.name,
        group=group,
        tags=list(tags) or None,
        mode=mode,
        dir=str(folder),
        # Its copy of the console would fight the progress display.
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=WANDB_START_SECONDS, **_upload_limit(wandb.Settings)
        ),
    )


def _upload_limit(settings: Any) -> dict[str, Any]:
    """At the run's end W&B would wait for a lost network without end; what is not sent stays for ``wandb sync``."""
    limit = {"finish_timeout": WANDB_FINISH_SECONDS, "finish_timeout_raises": True}
    return {key: value for key, value in limit.items() if key in getattr(settings, "model_fields", {})}


def _without_traceback(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer dies in its thread and raises the same at the next write: that is the one line to show."""
    if args.thread is None or type(args.thread).__module__.split(".")[0] != "tensorboard":
        threading.__excepthook__(args)


def make_trackers(
    run_dir: Path,
    warn: Warn,
    *,
    tensorboard: bool,
    wandb: Mapping[str, Any] | None,
    save_dir: Path | None,
    resume: bool,
) -> list[Forgiving]:
    """The started trackers; ``wandb`` holds `wandb_tracker`'s options, None leaves it out."""
    makers: dict[str, Callable[[], GeneralTracker]] = {"csv": lambda: CsvTracker(run_dir / "metrics.csv")}
    if tensorboard:
        threading.excepthook = _without_traceback
        makers["tensorboard"] = lambda: TensorBoardLog("tensorboard", save_dir or run_dir)
    if wandb is not None:
        makers["wandb"] = lambda: wandb_tracker(run_dir, **{"save_dir": save_dir, "resume": resume, **wandb})
    trackers = []
    for name, make in makers.items():
        try:
            tracker = Forgiving(make(), warn)
        except tracker_errors() as error:
            warn(f"{name} tracker cannot be made, the run goes on without it: {one_line(error)}")
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="wandb")
            tracker.start()
        trackers.append(tracker)
    return trackers
