"""Configurations of runs as text: flat, without secrets, and what sets several of them apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|private)_?key)s?$", re.IGNORECASE)
OF_THE_RUN_ALONE = (  # differ between runs that are repeats
    "experiment.seed", "experiment.output_dir", "experiment.export", "dataset.root", "dataset.num_workers", "logger.",
)  # fmt: skip


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text; the value of a key that names a secret is not shown."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if SECRET.search(str(key)):
            yield name, "(not shown)"
        elif isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, text_of(value)


def text_of(value: Any) -> str:
    """As YAML would have it, on one line; secrets inside lists of mappings are not shown either."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {v}" for k, v in flat(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Key -> its value in each of ``configs`` (a dash where it is not there), for the keys that set runs apart.

    Configurations that could not be read (empty) say nothing.
    """
    flattened = [dict(flat(config)) for config in configs]
    keys = dict.fromkeys(key for config in flattened for key in config)
    found = {
        key: [config.get(key, "-") for config in flattened] for key in keys if not key.startswith(OF_THE_RUN_ALONE)
    }
    return {
        key: values
        for key, values in found.items()
        if len({value for value, config in zip(values, flattened, strict=True) if config}) > 1
    }
