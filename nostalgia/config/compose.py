"""Composes the configuration from the files under ``configs/`` and words KEY=VALUE, by Hydra's compose API."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nostalgia.config.aliases import EVERY_METHOD, present_key, translate_saved
from nostalgia.config.checks import check
from nostalgia.config.saved import load_saved, load_suite
from nostalgia.config.schema import Config
from nostalgia.config.words import quoted, read_word
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.options import nearest
from nostalgia.utils.files import write_atomic

GROUPS = ("dataset", "model", "method", "train", "logger", "suite")
FREE_KEYS = ("model.config", "dataset.entries")  # what stands below them is the user's
OWN_SUITE = "own__"  # how Hydra knows a suite of the user's own: its file's name after this


def config_folder() -> Path:
    """``configs/``: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UsageError(f"no configs/config.yaml in {package} or beside it: the installation is incomplete")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def save(config: Config, path: Path) -> None:
    """Write the complete configuration, so that ``--config PATH`` runs it again; whole or not at all."""
    write_atomic(path, to_yaml(config))


def known_keys() -> list[str]:
    """All dotted keys of the configuration."""

    def walk(kind: Any, prefix: str) -> list[str]:
        keys = []
        for item in fields(kind):
            value = item.default_factory() if callable(item.default_factory) else item.default
            name = f"{prefix}{item.name}"
            keys.append(name)
            if is_dataclass(value):
                keys += walk(value, f"{name}.")
        return keys

    return walk(Config, "")


def choices(group: str) -> list[str]:
    """What ``configs/<group>/`` holds."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def suite_choice(given: str) -> str:
    """The name that Hydra knows a suite by; one in a file of the user's own is made known to it."""
    if not given.endswith((".yaml", ".yml")):
        return given
    name, content = OWN_SUITE + re.sub(r"\W", "_", Path(given).stem), load_suite(given)
    values: Any = OmegaConf.to_container(content, resolve=False)
    for key in _keys({name: value for name, value in values.items() if name != "defaults"}):
        _check_key(key, f"--suite {given}: ")
    ConfigStore.instance().store(group="suite", name=name, node=content, package="_global_")
    return name


def translate(word: str) -> str:
    """A word under its present key, its group choice checked before Hydra does; ``dataset=`` takes any name."""
    key, _, value = word.partition("=")
    bare = key.lstrip("+~")
    if bare == "nostalgia" and value == "default":
        return ""  # the group that once held what is now in the method's own file
    if "=" not in word:
        return word
    if bare != present_key(bare):
        return f"{present_key(bare)}={value}"
    if any(key.startswith(f"{free}.") for free in FREE_KEYS):
        return f"++{word}"  # new there or not
    if bare not in GROUPS:
        return word
    if value in choices(bare) or (key == "suite" and (value == "null" or value.startswith(OWN_SUITE))):
        return word
    if key == "dataset":
        return f"dataset.name={quoted(value)}"
    if key == "method" and ":" in value:
        return f"method.name={quoted(value)}"
    options = choices(bare)
    own = "; a folder or hub name goes by model.model_id=NAME" if key == "model" and "/" in value else ""
    raise UsageError(f"unknown {bare} {value!r}{nearest_key(value, options)}; there are {', '.join(options)}{own}")


def from_groups(words: list[str]) -> Config:
    """Of the files under ``configs/`` that the words choose, with their values on top."""
    return _checked(_with_own_model(words, _compose))


def from_file(path: Path, words: list[str]) -> Config:
    """A saved configuration, complete, with overrides of values on top."""
    return _checked(_with_own_model(words, lambda given: _saved(path, given)))


def from_run(folder: Path, words: list[str]) -> Config:
    """The configuration of a run that exists, with overrides of values on top."""
    if not (folder / "config.yaml").is_file():
        what = "has no config.yaml: not a run's folder" if folder.is_dir() else "no such folder"
        raise NotFoundError(f"--resume {folder}: {what}; give the folder of a run, or latest")
    return from_file(folder / "config.yaml", words)


def _with_own_model(words: list[str], compose: Callable[[list[str]], Any]) -> Any:
    """``compose(words)``, in which a network that the words choose takes nothing from the file of another.

    Another library than the file's: its weights, architecture and settings belong to the other one and go, unless
    they are given too. The name in results follows what was chosen.
    """
    try:
        return _own_model(words, compose)
    except OmegaConfBaseException as error:  # what a word's ${...} refers to
        raise UsageError(_one_line(error)) from None


def _own_model(words: list[str], compose: Callable[[list[str]], Any]) -> Any:
    given = {word.partition("=")[0].lstrip("+") for word in words}
    model = (composed := compose(words)).model
    if "model.framework" in given:
        file = compose([word for word in words if not word.startswith("model.framework=")]).model
        if file.framework != model.framework:
            model.arch = model.arch if "model.arch" in given else None
            model.model_id = model.model_id if "model.model_id" in given else None
            if "model.lora.target_modules" not in given:
                model.lora.target_modules = None
            with open_dict(model.config):
                for key in set(file.config) - {name.removeprefix("model.config.") for name in given}:
                    model.config.pop(key)
    described = model.framework == "torchvision" or "model_type" in model.config
    if "model.model_id" in given and model.model_id is not None and not model.pretrained and described:
        how = "model.arch" if model.framework == "torchvision" else "model.config.model_type"
        raise UsageError(
            f"model.model_id={model.model_id} would not be read: with model.pretrained=false {how} describes the network; "
            "leave one of them out, or choose a pretrained one with it (model=vit, model=resnet50)"
        )
    if given & {"model.arch", "model.model_id"} and "model.name" not in given:
        network = model.arch or model.model_id
        model.name = Path(network).name if network else model.name
    return composed


def _compose(words: list[str]) -> Any:
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    try:
        overrides = _parsed(words)
        of_methods = [one for one in overrides if _of_methods(one)]
        with initialize_config_dir(version_base=None, config_dir=str(config_folder())):
            composed = compose("config", overrides=[str(one.input_line) for one in overrides if not _of_methods(one)])
        _apply_method_words(composed, of_methods)
        return composed
    except HydraException as error:
        raise UsageError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from None


def _parsed(words: list[str]) -> list[Override]:
    """Words as Hydra's grammar reads them, their keys checked."""
    overrides = [read_word(word) for word in words]
    for override in overrides:
        _check_key(override.key_or_group)
    return overrides


def _of_methods(override: Override) -> bool:
    return override.key_or_group.startswith(("method.", "methods."))


def _apply_method_words(composed: Any, overrides: list[Override]) -> None:
    """Options of the method: those of its file, then `methods.<name>`, then the command line's ``method.<option>``.

    What is meant for every method that has it (`EVERY_METHOD`), or for another one, is left for when the methods' classes are
    known.
    """
    method: dict[str, Any] = OmegaConf.to_container(composed["method"], resolve=True)  # type: ignore[assignment]
    methods: dict[str, Any] = OmegaConf.to_container(composed["methods"], resolve=True)  # type: ignore[assignment]
    for owner, values in methods.items():
        if not isinstance(values, dict):
            raise UsageError(f"methods.{owner}={values}: allowed are options by name, methods.{owner}.OPTION=VALUE")
    given: dict[str, Any] = {}
    for override in overrides:
        group, _, rest = override.key_or_group.partition(".")
        if override.is_delete():
            raise UsageError(f"~{override.key_or_group}: leave the option out instead")
        if group == "method":
            given[rest] = override.value()
        else:
            owner, _, option = rest.rpartition(".")
            methods.setdefault(owner, {})[option] = override.value()
    name = str(given.get("name", method.get("name")))
    if name != method.get("name"):
        method = {"name": name}
    every = {key: value for key, value in methods.get(EVERY_METHOD, {}).items() if key not in given}
    method = {**method, **methods.get(name, {}), **given}
    left = {owner: values for owner, values in methods.items() if owner not in (name, EVERY_METHOD)}
    with open_dict(composed):
        composed["method"], composed["methods"] = method, {**left, **({EVERY_METHOD: every} if every else {})}


def _saved(path: Path, words: list[str]) -> Any:
    if any(word.split("=")[0].lstrip("+") in GROUPS for word in words):
        raise UsageError("--config FILE is a complete configuration: override values (train.lr=1e-3), not groups")
    try:
        values: Any = OmegaConf.to_container(load_saved(path))
        if not isinstance(values, dict) or not all(
            isinstance(section, (dict, type(None))) for section in values.values()
        ):
            raise UsageError(f"--config {path}: not sections with values; give a config.yaml that a run has written")
        loaded = OmegaConf.create(translate_saved(values))
        missing = [key for key in Config.__dataclass_fields__ if key not in loaded and key != "methods"]
        if missing:
            raise UsageError(f"{path}: no section {missing[0]!r}; give a config.yaml that a run has written")
        method, methods = loaded.pop("method"), loaded.pop("methods", {})
        composed: Any = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        with open_dict(composed):
            composed["method"], composed["methods"] = method, methods
        overrides = _parsed(words)
        for override in overrides:
            if not _of_methods(override):
                OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)
        _apply_method_words(composed, [one for one in overrides if _of_methods(one)])
        return composed
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({_one_line(error)})") from None
    except (HydraException, OmegaConfBaseException, TypeError) as error:
        raise UsageError(f"--config {path}: {_one_line(error)}") from None


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested sections; what the configuration has no sections below is one key."""
    sections = {key.rpartition(".")[0] for key in known_keys()}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key in sections:
            yield from _keys(value, f"{key}.")
        else:
            yield key


def _check_key(key: str, where: str = "") -> None:
    keys = known_keys()
    if key in GROUPS or key in keys or any(key.startswith(f"{free}.") for free in FREE_KEYS):
        return
    if key.startswith("method.") or (key.startswith("methods.") and key.count(".") > 1):
        return  # the method's own, checked by its class
    raise UsageError(f"{where}unknown key {key}{nearest_key(key, keys)}")


def _checked(composed: Any) -> Config:
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from None
    assert isinstance(config, Config)
    # On the command line `true` is a boolean, which a key of words turns into "True".
    config.curvature.retain_graph = config.curvature.retain_graph.lower()
    config.analysis.predict_forgetting = config.analysis.predict_forgetting.lower()
    check(config)
    return config


def nearest_key(word: str, options: list[str]) -> str:
    close = nearest(word, options)
    if not close and "." in word:  # the right key in the wrong group
        close = next((f"; did you mean {one}?" for one in options if one.endswith("." + word.rsplit(".", 1)[1])), "")
    if not close:
        close = next((f"; did you mean {one}?" for one in options if one.endswith("." + word)), "")
    return close


def _one_line(error: BaseException) -> str:
    """The innermost message of a chain of errors, with the key it is about, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith("raised while composing config:"):  # Hydra's; what is wrong comes after it
        lines = [f"{lines[0].split(':')[0]}: {lines[1]}", *lines[2:]]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    text = re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__
    return f"{key}: {text}" if key and key not in text else text
