"""Configurations in files: one that a run has saved, plain values whoever wrote them, and a suite of the user's own."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nostalgia.errors import UsageError
from nostalgia.utils.yaml_files import why_not_plain


def load_saved(path: Path) -> Any:
    """The values in ``path``; raises UsageError for what is no plain value, OSError where it cannot be read.

    A saved configuration is resolved. An interpolation in it would bring this machine's environment into the files of
    the run that is started from it: ``${oc.env:WANDB_API_KEY}``.
    """
    text = path.read_text(encoding="utf-8")
    reason = why_not_plain(text)
    if reason is not None:
        raise UsageError(f"--config {path}: {reason}")
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except (yaml.YAMLError, ValueError) as error:  # stricter than YAML: a key that is there twice
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split())[:100]})") from None
    for key, value in _flat(OmegaConf.to_container(loaded, resolve=False)):
        if "${" in f"{key}{value}":
            raise UsageError(f"--config {path}: {key}={value}: a saved configuration has no ${{...}}; write the value")
    return loaded


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All plain values within mappings and lists, by dotted key."""
    if isinstance(value, (Mapping, list)) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def load_suite(given: str) -> DictConfig:
    """The user's own suite in the file ``given``, as Hydra reads the others; raises UsageError for what is none."""
    try:
        content = OmegaConf.load(given)
    except FileNotFoundError:
        raise UsageError(f"--suite {given}: no such file; a suite that comes along goes by its name alone") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"--suite {given}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, DictConfig):
        raise UsageError(f"--suite {given}: it is a list; wanted are sections with keys, as in configs/suite/")
    return content
