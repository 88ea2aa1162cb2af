"""Which folder a run writes to, and the checkpoint it goes on from."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from nostalgia.checkpoint import store
from nostalgia.config import Config, Request, save
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.experiment.method_choice import changes
from nostalgia.methods.loading import method_code
from nostalgia.parallel.coordination import from_main, on_main
from nostalgia.training.loop import SavedPhase
from nostalgia.utils.versions import versions

_lock: Any = None  # the open file: held as long as the process lives


@dataclass
class ResumedRun:
    """A run that goes on in its folder. ``values`` is on rank 0 only; ``state`` is None where it begins anew."""

    run_dir: Path
    source: str = ""  # the checkpoint's folder, for messages
    state: dict[str, Any] | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    log_position: dict[str, int] = field(default_factory=dict)
    random_state: dict[str, Any] | None = None  # this rank's
    phase: SavedPhase | None = None


def open_run(request: Request, accelerator: Accelerator) -> tuple[Path, ResumedRun | None]:
    """A fresh run folder, or the one to go on in with the checkpoint to go on from.

    Raises, on every rank: UsageError for a configuration that is not the run's, NotFoundError for a folder that is no
    run's or whose checkpoints are all damaged.
    """
    folder, resumed = on_main(accelerator, lambda: _open(request))
    if resumed is None:
        return folder, None
    if accelerator.is_main_process:
        resumed.values = _values.pop()
    resumed.state = from_main(accelerator, resumed.state)
    if resumed.state is not None:
        with store.readable_checkpoint(resumed.source):
            _keep_global_batch(request.config, resumed.state, accelerator.num_processes)
        on_main(accelerator, lambda: _save_config(request.config, folder))
    return folder, resumed


_values: list[dict[str, Tensor]] = []  # rank 0's tensors, kept out of what is sent to all


def _open(request: Request) -> tuple[Path, ResumedRun | None]:
    config, folder = request.config, request.run_dir
    exists = folder is not None and (folder / "config.yaml").is_file()
    # Ranks that a launcher has started again go on, however the first ones were called.
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if folder is not None and request.resume is None and exists and not restarted:
        raise UsageError(f"--run-dir {folder}: holds a run already; add --resume auto to go on with it")
    if folder is None or (request.resume in (None, "auto") and not exists):
        made = make_run_folder(config, folder)
        _take_lock(made)
        return made, None
    if not exists:
        what = "no such folder" if not folder.is_dir() else "has no config.yaml: not a run's folder"
        raise NotFoundError(f"--resume {folder}: {what}; give the folder of a run, or latest")
    _take_lock(folder)
    store.clean(folder)
    found = store.newest(folder)
    _values.append({} if found is None else found.tensors())
    if found is None:
        _say(f"{folder}: no checkpoint yet, the run begins anew")
        _save_config(config, folder)
        store.discard_all(folder)
        return folder, ResumedRun(folder)
    for line in found.damaged:
        _say(f"passed over: {line}")
    state = found.state()
    with store.readable_checkpoint(found.folder):
        _refuse_earlier_version(state["config"])
        _keep_precision(config, state["config"], request.resume_override)
        _compare(config, state["config"], request.resume_override)
        run, then = state["run"], state["versions"]
        other = [
            f"{name} {version} (was {then.get(name)})"
            for name, version in versions().items()
            if version != then.get(name)
        ]
        if other:
            _say(f"note: {', '.join(other)}: what follows equals the run as begun to rounding, not to the bit")
        name = str(config.method["name"])
        if state.get("code", "") != method_code(name):
            _say(f"note: the code of method={name} has changed since the run began: what follows is by the new one")
        _say(f"resuming from {found.folder} (round {run['round']}, {run['stage']}, step {_steps(state)})")
        resumed = ResumedRun(
            run_dir=folder,
            source=str(found.folder),
            state=state,
            references=found.manifest["references"],
            log_position={str(name): int(size) for name, size in state["log"].items()},
        )
    _save_config(config, folder)
    return folder, resumed


def make_run_folder(config: Config, folder: Path | None = None) -> Path:
    """A fresh ``<output_dir>/<date_time>/``, or ``folder``, with config.yaml."""
    parent = Path(config.experiment.output_dir).expanduser() if folder is None else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = folder if folder is not None else _unused(parent)
        made.mkdir(exist_ok=folder is not None)
        save(config, made / "config.yaml")
    except OSError as error:
        option = f"experiment.output_dir={parent}" if folder is None else f"--run-dir {folder}"
        raise UsageError(f"{option}: cannot be written ({error.strerror or error}); name another folder") from None
    return made


def point_latest_at(folder: Path) -> None:
    """Let ``latest`` beside a run's folder mean it."""
    link = folder.parent / f".latest-{os.getpid()}"
    try:
        link.symlink_to(folder.name)
        os.replace(link, folder.parent / "latest")
    except OSError as error:
        raise UsageError(f"{folder.parent}/latest: cannot be written ({error.strerror or error})") from None


def _unused(parent: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, number = parent / stamp, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stamp}_{number}"
    return folder


def _compare(config: Config, saved: dict[str, Any], override: bool) -> None:
    """Raise UsageError naming what differs from the run's configuration and would change its result."""
    changed = changes(saved, config)
    if changed and not override:
        raise UsageError(
            f"--resume: {'; '.join(changed[:5])}: this would not be the same run; leave it as it was, or give "
            "--resume-override to go on with it all the same"
        )


def _refuse_earlier_version(saved: dict[str, Any]) -> None:
    """Raise UsageError for a run of 0.1.0, whose configuration had a section of this name."""
    if "nostalgia" in saved:
        raise UsageError(
            "--resume: this run was begun by an earlier version, with which it must be ended; report, figures and evaluate "
            "still read it"
        )


def _keep_precision(config: Config, saved: dict[str, Any], override: bool) -> None:
    """What ``auto`` became when the run began stays, on whatever machine it goes on; raises UsageError otherwise."""
    then, now = saved["train"]["precision"], config.train.precision
    if now != then and not override:
        raise UsageError(
            f"--resume: the run was begun in train.precision={then}, here it would go on in {now}: give "
            f"train.precision={then} on a machine that has it, or --resume-override"
        )


def _keep_global_batch(config: Config, saved: dict[str, Any], world_size: int) -> None:
    """On another number of ranks, choose the batch per device that makes the run's own global batch."""
    per_rank, rest = divmod(saved["global_batch"], world_size)
    accumulation = config.train.gradient_accumulation_steps
    if rest or per_rank % accumulation:
        raise UsageError(
            f"--resume: the run's global batch of {saved['global_batch']} cannot be cut over {world_size} ranks with "
            f"train.gradient_accumulation_steps={accumulation}; use a number of ranks that divides it"
        )
    kept = per_rank // accumulation
    if config.dataset.batch_size != kept:
        _say(
            f"note: dataset.batch_size={config.dataset.batch_size} is ignored: {kept} a device keeps the run's global batch "
            f"of {saved['global_batch']}"
        )
    config.dataset.batch_size = kept


def _save_config(config: Config, folder: Path) -> None:
    try:
        save(config, folder / "config.yaml")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _take_lock(folder: Path) -> None:
    """Two processes must not write to one run; the lock goes with its process, however that ends."""
    global _lock
    _lock = (folder / ".lock").open("wb")
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder}: another process is running in this folder; wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks


def _steps(state: dict[str, Any]) -> int:
    return state["run"]["step"] + (state["phase"]["taken"] if state["phase"] else 0)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
