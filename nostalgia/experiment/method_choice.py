"""The method that the configuration names, with its options, and how it has curvature measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from omegaconf import OmegaConf

from nostalgia.config import free_keys
from nostalgia.config.aliases import EVERY_METHOD
from nostalgia.config.schema import Config, LoraConfig, ModelConfig
from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.errors import UsageError
from nostalgia.experiment.task_data import task_specs
from nostalgia.methods.base import Method
from nostalgia.methods.eigensolve import check_eigensolve
from nostalgia.methods.loading import BUILT_IN, hooks_note, make_method, method_class
from nostalgia.options import nearest, read_options
from nostalgia.training.optimizers import check_optimizer
from nostalgia.utils.nested import flatten


def complete_method(config: Config) -> list[str]:
    """Put all options of the chosen method, checked, into ``config.method``, and what model.lora.merge=auto means with it.

    Returns notes for the user, one line each. Raises UsageError for an option that the method does not have or allow,
    NotFoundError for a class that is not there.
    """
    given = dict(config.method)
    name = str(given.pop("name"))
    kind = method_class(name)
    given = {**config.methods.get(kind.name, {}), **given}
    strange = []
    for owner in sorted(set(config.methods) - {EVERY_METHOD, kind.name}):
        if owner in BUILT_IN:  # of no effect, yet checked
            read_options(method_class(owner).Config, config.methods[owner], f"methods.{owner}")
        else:
            strange.append(owner)
    known = {item.name for item in kind.Config.__dataclass_fields__.values()}
    every = {key: value for key, value in config.methods.get(EVERY_METHOD, {}).items() if key in known}
    method = make_method(name, {**given, **every}, config.experiment.seed)
    method.check(len(task_specs(config)), curvature_options(config))
    check_optimizer(config.train.optimizer, needs_metric=method.needs_metric)
    if method.restarts_adapters and not config.model.use_lora:
        raise UsageError(f"method={name}: it begins adapters anew, and the network has none; set model.use_lora=true")
    if config.model.use_lora and config.model.lora.merge == "task" and method.keeps_positions:
        tail = f" method.tail={method.config.tail}" if hasattr(method.config, "tail") else ""
        raise UsageError(
            f"model.lora.merge=task with method={name}{tail}: it holds parameters to what they were, and adapters begun anew "
            "are others; use model.lora.merge=never"
        )
    unused = _unused_lora(config.model)
    options = method.config
    config.method, config.methods = {"name": name, **asdict(options)}, {}
    config.model.lora.merge = "task" if merges_adapters(config, method) else "never"
    if (
        config.analysis.predict_forgetting == "true"
        and config.model.lora.merge == "never"
        and not _has_curvature(method)
    ):
        check_eigensolve(config.analysis.top_k, curvature_options(config), "analysis.top_k")
    unused += [
        f"methods.{owner} is of no method here, its options have no effect{nearest(owner, [kind.name, *BUILT_IN])}"
        for owner in strange
    ]
    return [*unused, *([] if name in BUILT_IN else [hooks_note(name)])]


def _has_curvature(method: Method) -> bool:
    """Whether the method takes curvature of its own, which its prediction of forgetting is then made of."""
    return (type(method).eigenpairs, type(method).factors) != (Method.eigenpairs, Method.factors)


def _unused_lora(model: ModelConfig) -> list[str]:
    """A note where adapters are described and not used; their merging is refused then."""
    plain, given = LoraConfig(), model.lora
    names = [item.name for item in fields(plain) if item.name != "merge"]
    unused = [f"model.lora.{name}" for name in names if getattr(given, name) != getattr(plain, name)]
    if model.use_lora or not unused:
        return []
    return [f"without model.use_lora=true of no effect: {', '.join(unused)}"]


def chosen_method(config: Config) -> Method:
    """The run's method, made anew."""
    options: dict[str, Any] = {key: value for key, value in config.method.items() if key != "name"}
    return make_method(str(config.method["name"]), options, config.experiment.seed)


def changes(saved: Mapping[str, Any], config: Config, *, fixed: frozenset[str] = frozenset()) -> list[str]:
    """What a run's saved configuration has otherwise than ``config`` and a result depends on, a text each.

    Free are the keys and the method's options that say so, but for those ``fixed``.
    """
    mine = flatten(OmegaConf.to_container(OmegaConf.structured(config), resolve=True))  # type: ignore[arg-type]
    theirs = flatten(saved)
    options = method_class(config.method["name"]).Config.__dataclass_fields__.items()
    free = (free_keys() | {f"method.{name}" for name, item in options if item.metadata.get("free")}) - fixed
    keys = [key for key in sorted(mine | theirs) if key not in free]
    return [f"{key} was {theirs.get(key)}, is {mine.get(key)}" for key in keys if mine.get(key) != theirs.get(key)]


def merges_adapters(config: Config, method: Method) -> bool:
    """Adapters are added into the weights and begun anew before each later task."""
    merge = config.model.lora.merge
    wanted = merge == "task" or (merge == "auto" and method.prefers_merged_adapters)
    rounds = 1 if method.joint else len(task_specs(config))
    return config.model.use_lora and rounds > 1 and (wanted or method.restarts_adapters)


def curvature_options(config: Config) -> CurvatureOptions:
    """The options of ``curvature`` that say how it is measured, and the run's seed."""
    shared = {item.name for item in fields(CurvatureOptions)} & {item.name for item in fields(config.curvature)}
    given = {name: getattr(config.curvature, name) for name in shared}
    given["retain_graph"] = {"true": True, "false": False}.get(given["retain_graph"], "auto")
    return CurvatureOptions(**given, seed=config.experiment.seed)
