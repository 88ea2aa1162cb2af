"""The checkpoints of a run: written aside and renamed when whole, in the background; the newest whole one is read.

    checkpoints/000012_task2_train/     manifest.json, state.json, tensors.safetensors
    checkpoints/blocks/method.basis_<random>.safetensors     vectors that checkpoints refer to by checksum

Numbers grow by one; the last ``keep`` and every one taken at the end of a task stay.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nostalgia.checkpoint import files
from nostalgia.errors import NotFoundError
from nostalgia.utils.exit_code import finish_before_leaving
from nostalgia.utils.files import sync_folder

_NAME = re.compile(r"^(\d{6,})_[A-Za-z0-9_.-]+$")
TENSORS, STATE, BLOCKS = "tensors.safetensors", "state.json", "blocks"
TASK_END = "end_of_task"
FINISH_SECONDS = 120.0


@dataclass
class CheckpointContents:
    """What a checkpoint holds; tensors are whole, on the CPU, and no longer change."""

    label: str  # for people, part of the folder's name: task2_train
    kind: str  # step, epoch, end_of_task, stopped, eigensolve
    state: dict[str, Any]  # plain JSON values
    tensors: dict[str, Tensor]
    references: dict[str, str] = field(default_factory=dict)  # file of the run, relative -> checksum
    before: Callable[[], None] | None = None  # to be done before it counts: syncing the logs it refers to


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, verified."""

    folder: Path
    manifest: dict[str, Any]
    damaged: tuple[str, ...] = ()  # one line for each newer one that was passed over

    def state(self) -> dict[str, Any]:
        return files.read_object(self.folder / STATE)

    def tensors(self) -> dict[str, Tensor]:
        return files.read_tensors(self.folder / TENSORS)


class CheckpointStore:
    """Writes into ``run_dir``/checkpoints; rank 0 alone uses it."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.folder, self.keep = run_dir, run_dir / "checkpoints", keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None  # whose failure nobody has been told of
        self._latest: Future[Path] | None = None
        finish_before_leaving(self._finish)
        self._next = 1 + max((n for n, _ in _listed(self.folder)), default=0)

    def write(self, contents: CheckpointContents, *, background: bool) -> None:
        """Write ``contents``; in the background its failure comes from the next call of `write` or `wait`.

        Raises OSError where it cannot be written; then nothing of it is left, and the earlier ones are whole.
        """
        self.wait()
        number, self._next = self._next, self._next + 1
        self._latest = self._pending = self._thread.submit(self._write, number, contents)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Until what is being written is written; raises its OSError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(self) -> None:
        """Until the latest is written or has failed; TimeoutError after a while, so that a disk that hangs holds nobody."""
        if self._latest is not None:
            self._latest.exception(FINISH_SECONDS)

    @property
    def written(self) -> bool:
        """Whether there is one to go on from."""
        return bool(_listed(self.folder))

    @property
    def failed(self) -> bool:
        """Whether what was written in the background is known to have failed."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def _write(self, number: int, contents: CheckpointContents) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{number:06d}_{contents.label}"
        aside = self.folder / f".{target.name}.tmp"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            writer = files.Writer(aside)
            if contents.before is not None:
                contents.before()
            writer.tensors(TENSORS, contents.tensors)
            writer.json(STATE, contents.state)
            writer.finish({"kind": contents.kind, "label": contents.label}, contents.references)
            os.rename(aside, target)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._prune()
        return target

    def _prune(self) -> None:
        """Remove all but the last ``keep`` and those at the end of a task."""
        for _, folder in _listed(self.folder)[: -self.keep]:
            if not (folder.name.endswith(TASK_END)):
                # Renamed first: a folder half removed must not look like a damaged checkpoint.
                doomed = folder.with_name(f".{folder.name}.old")
                os.rename(folder, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        self._prune_blocks()

    def _prune_blocks(self) -> None:
        """Remove the vectors that no checkpoint refers to any more."""
        wanted: set[str] = set()
        for _, folder in _listed(self.folder):
            with contextlib.suppress(NotFoundError):
                wanted.update(files.read_manifest(folder)["references"])
        for path in (self.folder / BLOCKS).glob("[!.]*"):
            if path.relative_to(self.run_dir).as_posix() not in wanted:
                path.unlink()


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, all its files compared with their checksums; None where there is none.

    ``damaged`` of it says which newer ones were passed over, and why. Raises NotFoundError where there are
    checkpoints and all of them are damaged.
    """
    damaged: list[str] = []
    for _, folder in reversed(_listed(run_dir / "checkpoints")):
        try:
            manifest = files.read_manifest(folder)
            files.verify(folder, manifest, run_dir)
            return Checkpoint(folder, manifest, tuple(damaged))
        except NotFoundError as error:
            damaged.append(str(error))
    if damaged:
        raise NotFoundError(
            f"{run_dir}: no whole checkpoint ({len(damaged)} damaged; the newest: {damaged[0]}); start the run anew"
        )
    return None


@contextlib.contextmanager
def readable_checkpoint(source: object) -> Iterator[None]:
    """Turns what goes wrong with contents that are whole but make no sense into one NotFoundError about ``source``."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise NotFoundError(f"{source}: not a checkpoint that this version can read ({reason})") from None


def clean(run_dir: Path) -> None:
    """Remove what a process that was killed left half written."""
    for folder in (run_dir / "checkpoints", run_dir / "checkpoints" / BLOCKS):
        for path in folder.glob(".*") if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def discard_all(run_dir: Path) -> None:
    """Remove all checkpoints of a run that begins anew."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by number, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.match(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)
