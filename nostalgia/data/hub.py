"""Data sets of the Hugging Face hub, through `datasets`: from its cache, by download, or from a folder.

Code of a repository is never run: `datasets` refuses repositories that need it, and so does this module.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import Tensor

from nostalgia.data.catalog import Entry, Hub
from nostalgia.data.hub_columns import LABEL_COLUMNS, choose_columns, class_order, label_names
from nostalgia.data.images import ImageDataset, Subset, common_white, decode
from nostalgia.data.source import Source, make_source
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.utils.caches import unwritable

VAL_SPLITS = ("validation", "valid", "val", "test")


class HubImages:
    """A split of a `datasets` data set, its image column left undecoded until asked for."""

    in_memory = False

    def __init__(
        self, name: str, table: Any, column: str, labels: Tensor, classes: tuple[str, ...], where: str
    ) -> None:
        self.name, self.classes, self.labels, self.where = name, classes, labels, where
        # A datasets.Dataset: memory-mapped, shared with worker processes.
        self._table, self._column = table.select_columns([column]), column
        self._white: float | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, at_least: int | None = None) -> Tensor:
        file = self._file(index)
        if file is None:
            raise NotFoundError(f"{self.describe(index)}: no image in column {self._column!r}")
        where = self.describe(index) + (f" ({file})" if isinstance(file, str) else "")
        return decode(file, where, at_least, self.white)

    def white(self) -> float:
        """The value that is white in this table's images of 32-bit numbers."""
        if self._white is None:
            self._white = common_white(self._file, len(self))
        return self._white

    def _file(self, index: int) -> str | BytesIO | None:
        value = self._table[index][self._column] or {}
        return BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")

    def describe(self, index: int) -> str:
        return f"{self.where}, row {index}"


def on_disk(folder: Path) -> bool:
    """Whether a folder is laid out as by the hub or `datasets`: saved to disk, parquet, a repository."""
    if _saved(folder) or _described(folder):
        return True
    return any(
        next(place.glob(f"*.{kind}"), None) is not None
        for place in (folder, folder / "data")
        for kind in ("parquet", "arrow")
    )


def from_disk(entry: Entry, folder: Path, val_fraction: float) -> Source:
    """A data set of `on_disk`. Raises NotFoundError where it is broken, UsageError for columns in doubt."""
    import datasets

    known = entry.hub[0] if entry.hub else Hub(str(folder))
    try:
        with _quiet():
            if _saved(folder):
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder), known.config if _described(folder) else None)
    except _errors() as error:
        _refuse(error, str(folder))
        if cache := unwritable(error, datasets.config.HF_DATASETS_CACHE, "HF_DATASETS_CACHE"):
            raise NotFoundError(f"{folder}: {cache}") from None
        raise NotFoundError(
            f"{folder}: {_reason(error)}; broken or partial (a clone without its large files?): copy it again"
        ) from None
    splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    if not set((known.train or "train").split("+")) <= set(splits):
        # A copy may be split in another way than the repository it came from: take its splits by their names.
        known = replace(known, train=None, val=None)
    return _source(entry, known, str(folder), splits, val_fraction)


def from_hub(entry: Entry, hub: Hub, val_fraction: float, download: bool) -> tuple[Source | None, str]:
    """The data set ``hub.id`` from the cache of `datasets`, or from the hub where ``download``; or why not.

    Raises UsageError for a repository that needs code to be run, or leaves configuration or columns open.
    """
    import datasets

    cache = f"not in the cache {datasets.config.HF_DATASETS_CACHE}"
    if download and (why := _unreachable()):
        return None, f"hub {hub.id}: {cache}, and {why}"
    try:
        with _quiet(), contextlib.nullcontext() if download else _cache_only():
            found = datasets.load_dataset(hub.id, hub.config)
    except _errors() as error:
        _refuse(error, f"hub {hub.id}")
        if blocked := unwritable(error, datasets.config.HF_DATASETS_CACHE, "HF_DATASETS_CACHE"):
            return None, f"hub {hub.id}: {blocked}"
        if not download and isinstance(error, OSError):  # FileNotFoundError, ConnectionError: it is not there
            return None, f"hub {hub.id}: {cache}"
        return None, f"hub {hub.id}: {'' if download else 'the cached copy is broken: '}{_reason(error)}"
    return _source(entry, hub, _with_revision(hub.id, found), dict(found), val_fraction), ""


def _source(entry: Entry, hub: Hub, where: str, splits: dict[str, Any], val_fraction: float) -> Source:
    """Training and validation images of a dictionary of splits."""
    train_name = hub.train or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    val_name = hub.val
    if val_name is None and hub.train is None:
        val_name = next((s for s in VAL_SPLITS if s in splits and s != train_name), None)
    rows = _rows(splits, train_name, where)
    image, label = choose_columns(rows, hub, where)
    train = _images(entry, hub, rows, image, label, where, None)
    val = None
    if val_name is not None:
        val = _images(entry, hub, _rows(splits, val_name, where), image, label, where, train.classes)
    others = [name for name in LABEL_COLUMNS if name in rows.features and name != label and hub.label is None]
    notes = (f"labels are column {label!r}; label_column takes {' or '.join(others)}",) if others else ()
    return make_source(entry, "hub", where, train, val, val_fraction, notes)


def _rows(splits: dict[str, Any], names: str, where: str) -> Any:
    """A split, or several joined by "+"."""
    import datasets

    for name in names.split("+"):
        if name not in splits:
            raise NotFoundError(f"{where}: no split {name!r}; it has {', '.join(splits) or 'none'}")
    parts = [splits[name] for name in names.split("+")]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _images(
    entry: Entry, hub: Hub, rows: Any, image: str, label: str, where: str, classes: tuple[str, ...] | None
) -> ImageDataset:
    """The rows that count, labelled by class name; ``classes``: those of training, for validation."""
    import datasets

    if image not in rows.features or label not in rows.features:
        raise NotFoundError(f"{where}: the validation split has no column {image!r} or {label!r}")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    names = label_names(rows, label, where)
    keep = [name not in entry.drop for name in names]
    if hub.keep is not None:
        column, value = hub.keep
        if column not in rows.features:
            raise UsageError(f"{where}: no column {column!r} to choose {value!r} by; it has {', '.join(rows.features)}")
        keep = [k and v == value for k, v in zip(keep, label_names(rows, column, where), strict=True)]
    chosen = torch.tensor(keep, dtype=torch.bool).nonzero().flatten()
    kept = [names[i] for i in chosen.tolist()]
    order = classes or class_order(rows.features[label], kept)
    unknown = set(kept) - set(order)
    if unknown:
        raise NotFoundError(f"{where}: class {min(unknown)!r} of the validation split does not occur in training")
    index = {name: i for i, name in enumerate(order)}
    labels = torch.full((len(names),), -1, dtype=torch.int64)
    labels[chosen] = torch.tensor([index[name] for name in kept], dtype=torch.int64)
    whole = HubImages(entry.name, rows, image, labels, order, where)
    return whole if len(chosen) == len(names) else Subset(whole, chosen)


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """`datasets` as if HF_HUB_OFFLINE were set: what it has cached, without asking the network first."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' log lines: what matters in them comes as exceptions."""
    from datasets.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    before = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        hub_logging.set_verbosity(before[1])


def _saved(folder: Path) -> bool:
    return any((folder / f).is_file() for f in ("dataset_dict.json", "state.json"))


def _described(folder: Path) -> bool:
    """Whether a repository's card lies in the folder, saying what its data files are."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return text.startswith("---") and ("\nconfigs:" in text or "\ndataset_info:" in text)


def _unreachable() -> str:
    """Why the hub cannot be asked at all, or nothing: saves half a minute of retries without a network."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    host = urlparse(datasets.config.HF_ENDPOINT).hostname or ""
    if getproxies():
        return ""  # the proxy knows names that this machine does not
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f"{host} cannot be reached"
    return ""


def _with_revision(repository: str, found: Any) -> str:
    """``user/name@commit``: `datasets` keeps a repository's tables in a folder named by the commit."""
    for split in found.values():
        for file in split.cache_files:
            if re.fullmatch(r"[0-9a-f]{40}", commit := Path(file["filename"]).parent.name):
                return f"{repository}@{commit[:12]}"
    return repository


def _refuse(error: Exception, where: str) -> None:
    """Raise UsageError for what another name or entry would mend."""
    if "scripts are no longer supported" in str(error):
        raise UsageError(
            f"{where}: this repository needs code of its own to be run, which is refused; "
            "convert it to parquet or images, or use another"
        ) from None
    if "Config name is missing" in str(error):
        raise UsageError(f"{where}: {_reason(error)}; set hub_id and hub_config in dataset.entries.<name>") from None


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises for data that is missing, unreachable, gated or broken."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # pyarrow's ArrowInvalid is a ValueError; a missing configuration too.
    return (DatasetsError, HfHubHTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError, KeyError)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    text = " ".join(str(cause).split())
    return text[:200] + ("..." if len(text) > 200 else "") if text else type(cause).__name__
