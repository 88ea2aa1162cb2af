"""Where a Hugging Face model's files are: a local folder, the hub's cache, or a new download.

The cache is asked first and the network only for what is not there. The hub's client locks what it
downloads, so one process of a machine downloads while the others wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.utils.caches import unwritable

SETTINGS = ("config.json", "preprocessor_config.json")
#: File patterns of each format of weights, and its index where there are several files.
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def weights_folder(model_id: str, download: bool = True) -> Path:
    """The folder that holds settings and weights of ``model_id``.

    Raises NotFoundError where they cannot be had, UsageError for a name that cannot be one.
    """
    local = _local(model_id)
    if local is not None:
        return local
    cached = _cached(model_id)
    if cached is not None:
        return cached
    folder = _download(model_id, [*SETTINGS, *SAFETENSORS], download)
    return folder if _complete(folder) else _download(model_id, [*SETTINGS, *PICKLED], download)


def settings_folder(model_id: str, download: bool = True) -> Path:
    """The folder that holds ``config.json`` of ``model_id``; weights need not be there. Raises as above."""
    folder = _local(model_id) or _cached(model_id, weights=False)
    try:
        return folder or _download(model_id, list(SETTINGS), download)
    except NotFoundError as error:
        raise NotFoundError(
            f"model.pretrained=false reads the architecture from its config.json; {error}, or describe one by "
            "model.config.model_type=vit (model.config.hidden_size=..., and so on)"
        ) from error


def _local(model_id: str) -> Path | None:
    """``model_id`` as a folder, or None where it can only be a hub id."""
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UsageError(
            f"model.model_id={model_id} is a file: model.framework=hf wants a folder with config.json and "
            "weights (a torchvision state dict needs model.framework=torchvision and model.arch)"
        )
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise NotFoundError(f"model.model_id={model_id}: there is no such folder ({path.absolute()})")
    return None


def _cached(model_id: str, weights: bool = True) -> Path | None:
    """The snapshot of ``model_id`` in the hub's cache, if its settings (and all its weights) are there."""
    try:
        folder = Path(snapshot_download(model_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() and (_complete(folder) or not weights) else None


def check_weights(model_id: str, folder: Path) -> None:
    """Raise NotFoundError unless ``folder`` holds all weights of ``model_id``."""
    if not _complete(folder):
        raise NotFoundError(
            f"model.model_id={model_id}: no complete weights in {folder} (model.safetensors or "
            "pytorch_model.bin, or an index with every file it names); a partial download: remove the folder "
            "and get it again"
        )


def _complete(folder: Path) -> bool:
    """Whether ``folder`` holds weights, and each file that their index names."""
    for single, index in (("model.safetensors", SAFETENSORS[1]), ("pytorch_model.bin", PICKLED[1])):
        if (folder / single).is_file():
            return True
        if (folder / index).is_file():
            try:
                parts = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError):
                return False
            return all((folder / part).is_file() for part in parts)
    return False


def _download(model_id: str, patterns: Sequence[str], allowed: bool) -> Path:
    try:
        with quiet():
            return Path(snapshot_download(model_id, allow_patterns=list(patterns), local_files_only=not allowed))
    except HFValidationError as error:
        raise UsageError(f"model.model_id={model_id} is neither a local folder nor a hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NotFoundError(_not_had(model_id, error, allowed)) from error


def _not_had(model_id: str, error: Exception, allowed: bool) -> str:
    """One line: where ``model_id`` was looked for, why it could not be had, and how to put it there."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if not allowed:
        reason = "not asked: a dry run downloads nothing, the run itself would try"
    elif constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE=1 forbids the network"
    elif cache := unwritable(error, constants.HF_HUB_CACHE, "HF_HOME"):
        return f"model.model_id={model_id}: {cache}"
    elif status is not None:
        reason = f"HTTP {status}: no such repository, or no access to it"
    else:
        reason = "it cannot be reached"
    return (
        f"model.model_id={model_id}: not found; looked for a folder of that name, in the cache "
        f"{constants.HF_HUB_CACHE} (HF_HOME={constants.HF_HOME}) and on the hub ({reason}); "
        f"run `hf download {model_id}` where there is a network and copy HF_HOME here, or give a local folder"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading reports and progress bars out of ours within the block."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
