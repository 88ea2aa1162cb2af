"""Names of keys that have moved, in one place: what people and files made before say goes on meaning the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nostalgia.errors import UsageError

EVERY_METHOD = "every"  # in `methods`: options for whichever method has them

#: Options of the method, wherever it has them.
METHOD_OPTIONS = (
    "top_k",
    "k_max",
    "merge",
    "project",
    "projection_start_task",
    "basis_placement",
    "basis_dtype",
    "basis_memory_gb",
)
#: Former key -> present key.
ALIASES: dict[str, str] = {
    **{f"nostalgia.{name}": f"methods.{EVERY_METHOD}.{name}" for name in METHOD_OPTIONS},
    "nostalgia.project_params": "model.scope",
    "nostalgia.curvature": "curvature.kind",
    **{
        f"nostalgia.{name}": f"curvature.{name}"
        for name in (
            "hvp",
            "num_samples",
            "batch_size",
            "tol",
            "max_products",
            "max_basis",
            "precision",
            "retain_graph",
            "compile",
            "checkpoint_every_n_products",
        )
    },
    **{
        f"nostalgia.{name}": f"analysis.{name}"
        for name in ("spectral_density", "density_runs", "density_steps", "predict_forgetting", "trace_samples")
    },
    "nostalgia.guard_every_n_steps": "train.guard_every_n_steps",
}


def present_key(key: str) -> str:
    """The key that ``key`` means now; raises UsageError for one that has gone."""
    if key == "nostalgia.enabled":
        raise UsageError("nostalgia.enabled is gone: method=finetune trains without projection")
    return ALIASES.get(key, key)


def translate_saved(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration saved when ``nostalgia`` was a section of its own, under the present keys."""
    if "nostalgia" not in values:
        return dict(values)
    result: dict[str, Any] = {key: dict(value) for key, value in values.items() if key != "nostalgia"}
    former = dict(values["nostalgia"])
    if not former.pop("enabled", True):
        result["method"] = {"name": "finetune"}
    for name, value in former.items():
        section, _, rest = present_key(f"nostalgia.{name}").partition(".")
        if section == "methods":
            if result.get("method", {}).get("name") == "nostalgia":
                result["method"][name] = value
        else:
            result.setdefault(section, {})[rest] = value
    return result
